"""Imports point down, and importing the core stays light."""

import pathlib
import subprocess
import sys

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[2]
# What must not come along with the library: other frameworks, plotting, tokenizers.
_HEAVY = ("torch", "tensorflow", "transformers", "matplotlib", "tokenizers", "tiktoken", "pyarrow")


class ImportsTest(absltest.TestCase):
    def test_the_import_contract_holds(self):
        linter = pathlib.Path(sys.executable).with_name("lint-imports")
        result = subprocess.run(
            [linter, "--no-cache"], cwd=_ROOT, capture_output=True, text=True, check=False
        )
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_importing_a_run_loads_nothing_heavy(self):
        program = (
            "import sys, kimi_jax.pretrain; "
            f"print([name for name in {_HEAVY} if name in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=_ROOT, capture_output=True, text=True, check=True
        )
        self.assertEqual(result.stdout.strip(), "[]")


if __name__ == "__main__":
    absltest.main()
