"""Parameters read onto meshes, against values computed by loops from the same tensors."""

import dataclasses
import functools
import pathlib
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.core.errors import ConfigError
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_import import Int4Import, check_architecture, import_parameters
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.quantization.int4 import Int4Weight
from tests.support import families, tiny

_MESHES = {
    "data_and_expert": {"data": 2, "expert": 4},
    "data_and_tensor": {"data": 4, "expert": 1, "tensor": 2},
}
_QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def _files(name):
    """A folder of a family for all tests, and its tensors."""
    folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(folder.name) / name
    return folder, path, families.write_family(path, name)


def _import(name, mesh, **options):
    _, path, _ = _files(name)
    with HfCheckpoint(path) as checkpoint:
        params = import_parameters(checkpoint, mesh, **options)
        return params, checkpoint.files.bytes_read


def _logits(params, config, mesh):
    options = {"config": config, "choices": ComputeConfig(dtype=ComputeDtype.BFLOAT16)}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (8, 16)))

    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segments = jnp.ones_like(tokens)
        hidden, _ = transformer.forward(params, tokens, positions, segments, **options)
        return transformer.logits(params, hidden, **options)

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(run, compiler_options=_QUICK)(params, tokens), np.float32)


class HfImportTest(parameterized.TestCase):
    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        for name in families.FAMILIES:
            _files(name)[0].cleanup()

    @parameterized.product(family=list(families.FAMILIES), mesh=list(_MESHES))
    def test_a_family_has_the_values_and_the_layout_of_stored_parameters(self, family, mesh):
        mesh = tiny.mesh(**_MESHES[mesh])
        params, _ = _import(family, mesh)
        expected = families.parameters(_files(family)[2], families.FAMILIES[family])
        chex.assert_trees_all_equal(jax.device_get(params), expected)
        like = abstract_parameters(transformer.specs(families.FAMILIES[family].config), mesh)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda leaf: (leaf.sharding, leaf.dtype), params),
            jax.tree.map(lambda leaf: (leaf.sharding, leaf.dtype), like),
        )

    @parameterized.parameters("moonlight", "kimi_k2_bf16")
    def test_every_byte_is_read_once_whatever_the_mesh(self, family):
        size = sum(array.nbytes for array in _files(family)[2].values())
        for options in ({"data": 1, "expert": 1}, *_MESHES.values()):
            self.assertEqual(_import(family, tiny.mesh(**options))[1], size)

    def test_progress_ends_at_the_bytes_that_were_read(self):
        seen = []
        _, size = _import("kimi_k2", tiny.mesh(1, 1), progress=seen.append)
        self.assertEqual(max(seen), size)
        # Scales are read again for each head of a fused matrix; codes and all else only once.
        tensors = _files("kimi_k2")[2]
        needed = {n: a.nbytes for n, a in tensors.items() if not n.endswith("inv_freq")}
        scales = sum(size for name, size in needed.items() if name.endswith("_scale_inv"))
        codes = sum(needed.values()) - scales
        self.assertBetween(size, codes + scales, codes + 2 * scales)

    @parameterized.parameters(*_MESHES)
    def test_kept_codes_and_scales_are_the_files_bits(self, mesh):
        params, _ = _import("kimi_k2_5", tiny.mesh(**_MESHES[mesh]), int4=Int4Import.KEEP)
        tensors = _files("kimi_k2_5")[2]
        for member, published_name in (("w_gate", "gate"), ("w_up", "up"), ("w_down", "down")):
            weight = getattr(params.moe_blocks.feed_forward.experts, member)
            self.assertIsInstance(weight, Int4Weight)
            for expert in range(8):
                name = f"language_model.model.layers.1.mlp.experts.{expert}.{published_name}_proj"
                for field, suffix in ((weight.codes, "packed"), (weight.scales, "scale")):
                    expected = tensors[f"{name}.weight_{suffix}"]
                    self.assertEqual(field.dtype, expected.dtype)
                    found = np.ascontiguousarray(np.asarray(field)[0, expert].T)
                    self.assertEqual(found.tobytes(), expected.tobytes())

    def test_a_packed_import_computes_the_logits_of_the_dequantised_one(self):
        mesh = tiny.mesh(2, 4)
        config = families.FAMILIES["kimi_k2_thinking"].config
        kept, dequantised = (
            _logits(_import("kimi_k2_thinking", mesh, int4=what)[0], config, mesh)
            for what in (Int4Import.KEEP, Int4Import.DEQUANTIZE)
        )
        self.assertGreater(np.std(kept), 0.01)
        np.testing.assert_array_equal(kept, dequantised)

    def test_a_model_of_another_architecture_is_named_by_what_differs(self):
        config = families.K2
        with HfCheckpoint(_files("kimi_k2")[1]) as checkpoint:
            check_architecture(checkpoint, dataclasses.replace(config, max_position=77, yarn=None))
            other = dataclasses.replace(config, num_heads=4, norm_eps=1e-4)
            with self.assertRaisesRegex(ConfigError, "another architecture") as raised:
                check_architecture(checkpoint, other)
        message = str(raised.exception)
        self.assertIn("model.num_heads: 4 here, 2 there", message)
        self.assertIn("model.norm_eps: 0.0001 here, 1e-06 there", message)
        self.assertNotIn("embed_dim", message)


if __name__ == "__main__":
    absltest.main()
