"""Compiles a tiny run for absent TPUs by the program that a user runs. Needs the extra `aot`."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[2]
_TOLERANCE = 0.05  # of the closed form
_CONFIG = "--config=experiments/configs/tiny_cpu.py"


def _compile(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/aot_compile.py", _CONFIG, *options]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
class AotCompileSlowTest(absltest.TestCase):
    def test_a_tiny_run_is_compiled_for_tpus_and_its_operations_are_the_closed_forms(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "report.json"
            done = _compile("--topology=v5p:2x2x1", f"--json={file}")
            self.assertEqual(done.returncode, 0, done.stderr)
            report = json.loads(file.read_text())
        self.assertEqual(report["devices"], 4)
        self.assertLess(report["memory"]["peak"], report["memory"]["chip"])
        self.assertNotEmpty(report["buffers"])
        self.assertNotEmpty(report["collectives"])
        self.assertGreater(report["time"]["mfu"], 0)
        newton_schulz = report["flops"]["newton_schulz"]
        ratio = newton_schulz["counted"] / newton_schulz["closed_form"]
        self.assertAlmostEqual(ratio, 1.0, delta=_TOLERANCE)

    def test_a_mesh_that_is_too_large_is_refused(self):
        done = _compile("--topology=v5p:2x2x1", "--config.parallel.data=64")
        self.assertEqual(done.returncode, 2)
        self.assertIn("needs", done.stderr)
        self.assertIn("there are 4 (tpu)", done.stderr)


if __name__ == "__main__":
    absltest.main()
