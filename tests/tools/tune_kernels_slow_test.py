"""Tunes one kernel for an absent TPU by the program that a user runs. Needs the extra `aot`."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
class TuneKernelsSlowTest(absltest.TestCase):
    def test_the_best_tiles_of_a_case_are_written_with_their_predicted_time(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "table.json"
            command = [
                *(sys.executable, "tools/tune_kernels.py", "--chip=v5p", f"--output={file}"),
                *("--kernels=mla_decode", "--cases=16_of_4096", "--tiles=block=(1024|2048)"),
            ]
            environment = os.environ | {"PYTHONPATH": str(_ROOT)}
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            (entry,) = json.loads(file.read_text())
        self.assertEqual(entry["shape"], {"rows": 4096, "heads": 64, "latent": 512, "rope": 64})
        self.assertEqual((entry["kernel"], entry["how"]), ("mla_decode", "schedule"))
        self.assertEqual(entry["tiles"], {"block": 2048})
        # 75.5 MB of latents and rotated keys, and the queries, at 2765 GB/s.
        self.assertAlmostEqual(entry["microseconds"], 28.1, delta=1.0)


if __name__ == "__main__":
    absltest.main()
