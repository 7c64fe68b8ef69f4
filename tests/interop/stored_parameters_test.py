"""Parameters of checkpoints on disk, against the same parameters in memory."""

import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ComputeDtype
from kimi_jax.configs.quantization import WeightFormat
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.stored_parameters import stored_parameters
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.training import packed
from kimi_jax.training.checkpoint import CHECKPOINT_FOLDER, STATE_FOLDER, Checkpointer
from kimi_jax.training.state import abstract_state
from kimi_jax.training.step import make_optimizer
from tests.support import tiny

_EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


def _state(config, mesh):
    """A state whose parameters are `tiny.parameters`, and of zeros otherwise."""
    plan = transformer.specs(config.model)
    with jax.set_mesh(mesh):
        like = abstract_state(config, plan, make_optimizer(config, plan), mesh)
    zeros = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), like)
    return zeros.replace(params=tiny.parameters(mesh))


class StoredParametersTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def _check_equal(self, source, expected):
        for tensor in hf_tensors(tiny.MODEL).values():
            for rows in (slice(0, tensor.shape[0]), slice(1, tensor.shape[0] // 2)):
                found, wanted = (s.rows(tensor.name, rows) for s in (source, expected))
                self.assertEqual(found.dtype, wanted.dtype)
                np.testing.assert_array_equal(found, wanted, tensor.name)

    def test_masters_of_a_run_are_read_without_its_optimizer(self):
        mesh = tiny.mesh(2, 4)
        with Checkpointer(self.folder, keep=1) as checkpoints:
            checkpoints.save(_state(tiny.experiment(), mesh), {})
        path = self.folder / CHECKPOINT_FOLDER / "0" / STATE_FOLDER
        source = stored_parameters(path, tiny.MODEL, prefix="params.")
        self.assertIsNone(source.group_size)
        self._check_equal(source, ParameterSource.of(tiny.host_parameters(), tiny.MODEL))
        larger = dataclasses.replace(tiny.MODEL, vocab_size=65)
        with self.assertRaisesRegex(
            CheckpointFileError, rf"{path}: params.embedding must be \[65, 32\], but is \[64, 32\]"
        ):
            stored_parameters(path, larger, prefix="params.")
        with self.assertRaisesRegex(CheckpointFileError, "embedding must be .*, but is missing"):
            stored_parameters(path, tiny.MODEL)

    def test_a_packed_model_gives_codes_scales_and_their_values(self):
        mesh = tiny.mesh(1, 1)
        config = tiny.experiment(
            quantization={"format": WeightFormat.INT4, "group_size": 8},
            compute={"dtype": ComputeDtype.BFLOAT16},
        )
        with jax.set_mesh(mesh):
            packed.save_packed(self.folder / "packed", tiny.parameters(mesh), config)
            _, params = packed.load_packed(self.folder / "packed", mesh)
        source = stored_parameters(self.folder / "packed" / packed.WEIGHTS_FOLDER, tiny.MODEL)
        expected = ParameterSource.of(params, tiny.MODEL)
        self.assertEqual(source.group_size, 8)
        self._check_equal(source, expected)
        weight = params.moe_blocks.feed_forward.experts.w_down
        found = source.int4_rows(_EXPERT, slice(3, 20))
        for array, stored in zip(found, (weight.codes, weight.scales), strict=True):
            np.testing.assert_array_equal(array, np.asarray(stored)[1, 5].T[3:20])
        self.assertIsNone(source.int4_rows("model.norm.weight", slice(0, 2)))

    def test_a_folder_without_arrays_is_refused(self):
        with self.assertRaisesRegex(CheckpointFileError, f"{self.folder}: is no orbax checkpoint"):
            stored_parameters(self.folder, tiny.MODEL)


if __name__ == "__main__":
    absltest.main()
