"""Kimi K2's own training step, compiled for pods that are not there. Needs the extra `aot`."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[2]
_GIB = 2**30
_TOLERANCE = 0.05  # of operations against their closed form


def _compile(*options: str) -> dict:
    """Returns what `tools/aot_compile.py` reports of a step of one sequence a device."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "report.json"
        command = [
            sys.executable,
            "tools/aot_compile.py",
            "--config=experiments/configs/kimi_k2_pretrain_v5p.py",
            "--topology=v5p:8x8x8",
            "--config.training.accumulation_steps=1",
            f"--json={file}",
            *options,
        ]
        environment = os.environ | {"PYTHONPATH": str(_ROOT)}
        subprocess.run(command, cwd=_ROOT, env=environment, check=True)
        return json.loads(file.read_text())


@pytest.mark.slow
class KimiK2SlowTest(absltest.TestCase):
    def test_the_step_fits_512_chips_with_room(self):
        report = _compile("--config.training.batch_sequences=512")
        self.assertEqual(report["devices"], 512)
        self.assertLessEqual(report["memory"]["peak"], 42 * _GIB)
        for kind in ("passes", "newton_schulz"):
            row = report["flops"][kind]
            self.assertAlmostEqual(row["counted"] / row["closed_form"], 1.0, delta=_TOLERANCE)

    def test_the_step_compiles_for_2048_chips_in_four_slices(self):
        report = _compile(
            "--num_slices=4",
            "--config.parallel.replica=4",
            "--config.training.batch_sequences=2048",
        )
        self.assertEqual(report["devices"], 2048)
        self.assertLess(report["memory"]["peak"], report["memory"]["chip"])


if __name__ == "__main__":
    absltest.main()
