"""Published rows of parameters in memory, against a layout written down by hand."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.quantization.int4 import Int4Weight
from tests.support import families, tiny

_FAMILY = families.FAMILIES["kimi_k2_bf16"]
_CONFIG = _FAMILY.config
_EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def _tree():
    tensors = families.random_tensors(_FAMILY)
    return tensors, families.parameters(tensors, _FAMILY)


class ParameterSourceTest(parameterized.TestCase):
    def _check_rows(self, source, tensors):
        for tensor in hf_tensors(_CONFIG).values():
            size = tensor.shape[0]
            for rows in (slice(0, size), slice(size // 3, size - 1), slice(0, 1)):
                found = source.rows(tensor.name, rows)
                expected = tensors[tensor.name][rows].astype(np.float32)
                self.assertEqual(found.shape, expected.shape)
                np.testing.assert_array_equal(found.astype(np.float32), expected, tensor.name)

    def test_any_rows_of_host_arrays_are_the_published_ones(self):
        tensors, params = _tree()
        source = ParameterSource.of(params, _CONFIG)
        self.assertIsNone(source.group_size)
        self._check_rows(source, tensors)
        self.assertEqual(source.rows("model.norm.weight", slice(0, 1)).dtype, np.float32)

    @parameterized.parameters({"data": 2, "expert": 4}, {"data": 4, "expert": 1, "tensor": 2})
    def test_shards_on_devices_are_put_together(self, **axes):
        tensors, params = _tree()
        like = abstract_parameters(transformer.specs(_CONFIG), tiny.mesh(**axes))
        placed = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), params, like)
        self._check_rows(ParameterSource.of(placed, _CONFIG), tensors)

    def test_packed_experts_are_given_as_they_are_and_as_bfloat16(self):
        _, params = _tree()
        packed, scales = families.random_int4((64, 256), np.random.default_rng(0))
        weight = Int4Weight(codes=packed.T, scales=scales.T)
        weight = jax.tree.map(lambda leaf: np.stack([0 * leaf] * 3 + [leaf] * 5)[None], weight)
        mixture = params.moe_blocks.feed_forward
        mixture = mixture.replace(experts=mixture.experts.replace(w_up=weight))
        params = params.replace(moe_blocks=params.moe_blocks.replace(feed_forward=mixture))
        source = ParameterSource.of(params, _CONFIG)
        self.assertEqual(source.group_size, 32)
        rows = slice(5, 60)
        found = source.int4_rows(_EXPERT.format(3, "up"), rows)
        self.assertEqual(found.packed.tobytes(), packed[rows].tobytes())
        self.assertEqual(found.scales.tobytes(), scales[rows].tobytes())
        values = source.rows(_EXPERT.format(3, "up"), rows)
        self.assertEqual(values.dtype, jnp.bfloat16)
        np.testing.assert_array_equal(
            values.astype(np.float32), families.int4_values(packed, scales)[rows]
        )
        self.assertIsNone(source.int4_rows(_EXPERT.format(3, "gate"), rows))

    def test_a_packed_part_of_a_fused_matrix_stands_beside_the_other_part(self):
        tensors, params = _tree()
        name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
        packed, scales = families.random_int4((128, 256), np.random.default_rng(0))
        weight = Int4Weight(codes=packed.T[None], scales=scales.T[None])
        attention = params.dense_blocks.attention.replace(w_kv_down=weight)
        params = params.replace(dense_blocks=params.dense_blocks.replace(attention=attention))
        source = ParameterSource.of(params, _CONFIG)
        self.assertIsNone(source.int4_rows(name, slice(0, 144)))
        found = source.rows(name, slice(100, 144)).astype(np.float32)
        np.testing.assert_array_equal(found[:28], families.int4_values(packed, scales)[100:])
        np.testing.assert_array_equal(found[28:], tensors[name][128:].astype(np.float32))

    def test_a_tensor_is_put_together_once_for_all_threads(self):
        class Counted:
            def __init__(self, values):
                self.values, self.shape, self.dtype, self.reads = values, values.shape, None, 0

            def __getitem__(self, index):
                self.reads += 1
                return self.values[index]

        tensors, _ = _tree()
        config = dataclasses.replace(_CONFIG)
        head = Counted(tensors["lm_head.weight"].T)
        source = ParameterSource({"head": head}, config)
        found = [None] * 8

        def read(place):
            found[place] = source.rows("lm_head.weight", slice(6 * place, 6 * place + 6))

        threads = [threading.Thread(target=read, args=(place,)) for place in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(np.concatenate(found), tensors["lm_head.weight"])
        self.assertEqual(head.reads, 1)


if __name__ == "__main__":
    absltest.main()
