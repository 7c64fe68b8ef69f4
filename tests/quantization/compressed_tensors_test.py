import json
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.quantization import int4
from kimi_jax.quantization.compressed_tensors import (
    PackedLinear,
    from_compressed_tensors,
    to_compressed_tensors,
)

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "int4" / "compressed_tensors.npz"


class CompressedTensorsTest(absltest.TestCase):
    def test_words_scales_and_values_are_the_librarys(self):
        """The file was written with the library itself: tools/make_int4_golden.py."""
        with np.load(_GOLDEN) as golden:
            weight = int4.quantize(jnp.asarray(golden["weight"].T))
            tensors = to_compressed_tensors(weight)
            np.testing.assert_array_equal(tensors.weight_packed, golden["weight_packed"])
            self.assertEqual(tensors.weight_packed.dtype, golden["weight_packed"].dtype)
            scales = tensors.weight_scale.astype(jnp.float32)
            np.testing.assert_array_equal(scales, golden["weight_scale"])
            np.testing.assert_array_equal(tensors.weight_shape, golden["weight"].shape)
            values = int4.dequantize(weight, jnp.bfloat16).astype(jnp.float32)
            np.testing.assert_array_equal(values.T, golden["values"])
            self.assertIn("compressed-tensors", json.loads(str(golden["provenance"])))

    def test_there_and_back_keeps_every_bit_of_a_stack(self):
        weight = int4.quantize(jnp.sin(jnp.arange(3 * 64 * 5.0)).reshape(3, 64, 5))
        chex.assert_trees_all_equal(from_compressed_tensors(to_compressed_tensors(weight)), weight)

    def test_tensors_that_do_not_fit_raise(self):
        words, scales = jnp.zeros((5, 8), jnp.int32), jnp.ones((5, 2), jnp.bfloat16)
        with self.assertRaisesRegex(ValueError, r"do not belong to a weight \[5, 128\]"):
            from_compressed_tensors(PackedLinear(words, scales, np.array([5, 128])))
        with self.assertRaisesRegex(ValueError, "whose number divides 64"):
            from_compressed_tensors(
                PackedLinear(words, jnp.ones((5, 3), jnp.bfloat16), np.array([5, 64]))
            )


if __name__ == "__main__":
    absltest.main()
