import json
import pathlib
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ComputeDtype
from kimi_jax.configs.quantization import Quantize, WeightFormat
from kimi_jax.core.errors import CheckpointMismatchError, ConfigError
from kimi_jax.quantization.int4 import Int4Weight
from kimi_jax.training import packed
from kimi_jax.training.workdir import CONFIG_FILE
from tests.support import tiny


def _config(**quantization):
    options = {"format": WeightFormat.INT4, "group_size": 8} | quantization
    return tiny.experiment(quantization=options, compute={"dtype": ComputeDtype.BFLOAT16})


class PackedTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "packed"

    @parameterized.parameters(Quantize.STEP, Quantize.USE)
    def test_a_reloaded_model_computes_trainings_logits_bit_for_bit(self, quantize):
        config, mesh = _config(quantize=quantize), tiny.mesh(2, 2)
        with jax.set_mesh(mesh):
            params = tiny.parameters(mesh)
            trained = np.asarray(packed.random_logits(params, config, length=16))
            packed.save_packed(self.folder, params, config)
            plain, reloaded = packed.load_packed(self.folder, mesh)
            found = np.asarray(packed.random_logits(reloaded, plain, length=16))
            unrounded = np.asarray(packed.random_logits(params, plain, length=16))
        np.testing.assert_array_equal(found, trained)
        self.assertGreater(np.max(np.abs(unrounded - trained)), 0.01)
        self.assertIsInstance(reloaded.moe_blocks.feed_forward.experts.w_up, Int4Weight)
        self.assertEqual(reloaded.head.dtype, jnp.bfloat16)

    def _save(self, mesh):
        """Saves the same model each time, by one program; returns what is read back."""
        with jax.set_mesh(mesh):
            packed.save_packed(self.folder, tiny.parameters(mesh), _config())
            return jax.device_get(packed.load_packed(self.folder, mesh)[1])

    def test_another_mesh_reads_the_same_weights(self):
        first = self._save(tiny.mesh(2, 2))
        for other in (tiny.mesh(2, 4), tiny.mesh(1, 1)):
            with jax.set_mesh(other):
                reloaded = packed.load_packed(self.folder, other)[1]
            chex.assert_trees_all_equal(jax.device_get(reloaded), first)
            found = {leaf.sharding.mesh for leaf in jax.tree.leaves(reloaded)}
            self.assertEqual(found, {other})

    def test_a_run_that_rounds_nothing_and_a_folder_that_exists_raise(self):
        mesh = tiny.mesh(1, 1)
        with jax.set_mesh(mesh):
            params = tiny.parameters(mesh)
            with self.assertRaisesRegex(ConfigError, "nothing to pack"):
                packed.save_packed(self.folder, params, tiny.experiment())
            self.folder.mkdir()
            with self.assertRaisesRegex(ConfigError, "exists; name a folder"):
                packed.save_packed(self.folder, params, _config())

    def test_a_folder_that_is_not_complete_raises(self):
        mesh = tiny.mesh(2, 2)
        self._save(mesh)
        path = self.folder / CONFIG_FILE
        json.loads(path.read_text())
        path.unlink()
        with self.assertRaisesRegex(CheckpointMismatchError, "holds no run"):
            packed.load_packed(self.folder, mesh)


if __name__ == "__main__":
    absltest.main()
