"""Runs the program as a user does: what it prints, and its exit codes."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest

from kimi_jax.interop.safetensors_io import DTYPES, SafetensorsWriter, TensorInfo
from kimi_jax.training.checkpoint import Checkpointer
from kimi_jax.training.packed import WEIGHTS_FOLDER
from kimi_jax.training.state import TrainState

_ROOT = pathlib.Path(__file__).parents[2]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _inspect(**options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run(
        [sys.executable, "tools/inspect_checkpoint.py", *arguments],
        cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def _save(folder, arrays):
    folder.mkdir()
    infos = [TensorInfo(name, _NAMES[array.dtype], array.shape) for name, array in arrays.items()]
    with SafetensorsWriter(folder / "model.safetensors", infos, {}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def _arrays():
    """Two layers of three experts each, of which one is missing."""
    names = [f"layers.{i}.experts.{e}.w" for i in range(2) for e in range(3)]
    arrays = {name: np.full((2, 4), 2.0, DTYPES["BF16"]) for name in names[:-1]}
    return arrays | {"codes": np.arange(3, dtype=np.int32), "norm": np.ones(4, np.float32)}


def _save_run(folder):
    state = TrainState(
        step=jnp.int32(7),
        params={"w": jnp.full((2, 3), 2.0)},
        optimizer=None,
        clipped_ever=None,
        rng=jnp.zeros(2, jnp.uint32),
    )
    with Checkpointer(folder, keep=2) as checkpoints:
        checkpoints.save(state.replace(step=jnp.int32(3), params={"old": jnp.ones(1)}), {})
        checkpoints.save(state, {})


def _save_packed(folder):
    tree = {"params": {"w": jnp.full((2, 3), 2.5, jnp.bfloat16)}, "head": jnp.ones(4)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / WEIGHTS_FOLDER, tree)


def _cells(output):
    """Cells of each line of the tables; an empty list for other lines."""
    return [[x.strip() for x in line.split("│")[1:-1]] for line in output.splitlines()]


class InspectCheckpointTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Runs all commands, two at a time: most of a run is its start."""
        super().setUpClass()
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        one, other, run, packed = (folder / name for name in ("one", "other", "run", "packed"))
        _save(one, _arrays())
        changed = _arrays()
        changed["layers.1.experts.0.w"][1, 2] = np.nan
        changed["layers.0.experts.1.w"][0, 0] = 3.0
        changed["norm"] = changed["norm"].astype(DTYPES["BF16"])
        changed["new.0"] = np.ones(2, np.float32)
        del changed["codes"]
        _save(other, changed)
        _save_run(run)
        _save_packed(packed)
        (folder / "empty").mkdir()
        both = {"checkpoint": one, "diff": other}
        commands = {
            "tree": {"checkpoint": one},
            "each": {"checkpoint": one, "each": True, "filter": r"experts\.0"},
            "norms": {"checkpoint": other, "norms": True},
            "diff": both,
            "names": both | {"values": False, "filter": "experts"},
            "same": {"checkpoint": one, "diff": one},
            "orbax": {"checkpoint": run, "diff": packed},
            "empty": {"checkpoint": folder / "empty"},
            "no model": {"checkpoint": one, "dequantize": True},
            "regex": {"checkpoint": one, "filter": "("},
            "no match": {"checkpoint": one, "filter": "zzz"},
            "two modes": both | {"norms": True},
            "no diff": {"checkpoint": one, "values": False},
        }
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            done = pool.map(lambda options: _inspect(**options), commands.values())
            cls.done = dict(zip(commands, done, strict=True))

    def _assert_printed(self, name, *cells):
        rows = _cells(self.done[name].stdout)
        for expected in cells:
            self.assertIn(expected, rows, self.done[name])

    def test_tensors_are_grouped_and_missing_ones_counted(self):
        self._assert_printed(
            "tree",
            ["layers.{0..1}.experts.{0..2}.w", "5 of 6", "BF16", "[2, 4]", "0.000 MB"],
            ["codes", "1", "I32", "[3]", "0.000 MB"],
        )
        self.assertIn("7 tensors", self.done["tree"].stdout)
        self.assertEqual(self.done["tree"].returncode, 0)

    def test_each_tensor_has_its_line_if_asked_and_others_are_filtered(self):
        rows = [row[0] for row in _cells(self.done["each"].stdout) if row]
        self.assertEqual(rows, ["layers.0.experts.0.w", "layers.1.experts.0.w"])

    def test_norms_are_shown_with_where_the_largest_and_the_bad_ones_are(self):
        (row,) = (row for row in _cells(self.done["norms"].stdout) if row and "experts" in row[0])
        rms = np.sqrt((38 * 4 + 9) / 39)
        where = ["3 in layers.0.experts.1.w", "1 in layers.1.experts.0.w"]
        self.assertEqual(row[5:], [f"{rms:.4g}", *where])

    def test_a_difference_is_shown_and_is_the_exit_code(self):
        self._assert_printed(
            "diff",
            ["codes", "1", "I32", "[3]", "0.000 MB"],
            ["new.0", "1", "F32", "[2]", "0.000 MB"],
            ["norm", "1", "F32 [4]", "BF16 [4]"],
            [
                "layers.{0..1}.experts.{0..2}.w",
                "2 of 5",
                "2",
                "inf in layers.1.experts.0.w",
                "inf in layers.1.experts.0.w",
            ],
        )
        self.assertEqual(self.done["diff"].returncode, 1)

    def test_values_are_not_compared_unless_wanted(self):
        self.assertIn("5 names in both", self.done["names"].stdout)
        self.assertEqual(self.done["names"].returncode, 0)

    def test_the_same_checkpoint_does_not_differ(self):
        self.assertIn("values of 7 tensors compared, 0 differ", self.done["same"].stdout)
        self.assertEqual(self.done["same"].returncode, 0)

    def test_the_newest_checkpoint_of_a_run_and_a_packed_model_are_compared(self):
        self._assert_printed(
            "orbax",
            ["step", "1", "I32", "[]", "0.000 MB"],
            ["head", "1", "F32", "[4]", "0.000 MB"],
            ["params.w", "1", "F32 [2, 3]", "BF16 [2, 3]"],
            ["params.w", "1 of 1", "6", "0.5", "0.2"],
        )
        self.assertNotIn("params.old", self.done["orbax"].stdout)
        self.assertEqual((self.done["orbax"].returncode, self.done["orbax"].stderr), (1, ""))

    def test_a_mistake_is_answered_by_one_line(self):
        answers = {
            "empty": "no *.safetensors",
            "no model": "config.json",
            "regex": "--filter=( is no regular expression",
            "no match": "--filter=zzz fits none of the 7 names",
            "two modes": "--norms or --diff",
            "no diff": "--novalues",
        }
        for name, answer in answers.items():
            self.assertEqual(self.done[name].returncode, 2, name)
            self.assertLen(self.done[name].stderr.splitlines(), 1)
            self.assertIn(answer, self.done[name].stderr)


if __name__ == "__main__":
    absltest.main()
