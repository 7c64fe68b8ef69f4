import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.quantization import int4

_MILLIONS = (16, 512, 512)  # 4.2 M weights


def _oracle(w, group_size):
    """The published rule in numpy: codes [..., K, N], scales [..., K / G, N] as float32."""
    *stack, inputs, outputs = w.shape
    groups = _to_bfloat16(w).reshape(*stack, inputs // group_size, group_size, outputs)
    scales = np.abs(groups).max(axis=-2) / np.float32(7)
    scales = _to_bfloat16(np.maximum(scales, np.float32(1e-5)))
    codes = np.clip(np.rint(groups / scales[..., None, :]), -7, 7)
    return codes.astype(np.int32).reshape(w.shape), scales


def _to_bfloat16(x):
    """Rounds float32 to bfloat16, ties to even, by its bits."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def _weights(dtype, shape=_MILLIONS):
    return 0.02 * jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


_quantize = jax.jit(int4.quantize, static_argnums=1)
_dequantize = jax.jit(int4.dequantize, static_argnums=1)


class QuantizeTest(parameterized.TestCase):
    @parameterized.product(dtype=(jnp.float32, jnp.bfloat16), group_size=(32, 64))
    def test_codes_scales_and_values_are_numpys_bit_for_bit(self, dtype, group_size):
        w = _weights(dtype)
        codes, scales = _oracle(np.asarray(w.astype(jnp.float32)), group_size)
        weight = _quantize(w, group_size)
        np.testing.assert_array_equal(jax.jit(int4.unpack)(weight.codes), codes)
        np.testing.assert_array_equal(weight.scales.astype(jnp.float32), scales)
        values = codes * np.repeat(scales, group_size, axis=-2)
        np.testing.assert_array_equal(_dequantize(weight, jnp.float32), values)
        rounded = _dequantize(weight, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(rounded, _to_bfloat16(values))

    def test_every_quotient_of_bfloat16_numbers_is_rounded_like_the_exact_one(self):
        mantissa = np.arange(128, 256, dtype=np.float32)
        exact = np.concatenate([mantissa[:, None] * 2.0**e / mantissa for e in range(-12, 4)])
        exact = exact[np.abs(exact) < 7.5]
        ties = np.mod(exact, 1.0) == 0.5
        self.assertGreater(ties.sum(), 100)
        self.assertGreater(np.abs(np.mod(exact, 1.0) - 0.5)[~ties].min(), 2.0**-10)
        nearest = jax.jit(int4.nearest_codes)
        for error in (-1e-6, 0.0, 1e-6):  # of a division by way of a reciprocal
            codes = nearest((exact * (1 + error)).astype(np.float32))
            np.testing.assert_array_equal(codes, np.clip(np.rint(exact), -7, 7))

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_a_second_time_changes_neither_codes_nor_scales(self, dtype):
        once = _quantize(_weights(dtype), 32)
        twice = _quantize(_dequantize(once, dtype), 32)
        np.testing.assert_array_equal(twice.codes, once.codes)
        np.testing.assert_array_equal(twice.scales, once.scales)

    def test_the_error_is_that_of_the_grid(self):
        w = _weights(jnp.float32)
        error = _dequantize(_quantize(w, 32), jnp.float32) - w
        relative = float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(w**2)))
        self.assertAlmostEqual(relative, 0.0970, delta=0.0005)  # groups of 32 of a normal weight

    def test_zeros_and_tiny_weights_stay_finite_and_idempotent(self):
        w = jnp.concatenate([jnp.zeros((32, 4)), jnp.full((32, 4), 1e-9), jnp.full((32, 4), 3e-5)])
        once = int4.quantize(w)
        values = int4.dequantize(once, jnp.float32)
        np.testing.assert_array_equal(values[:64], 0.0)
        np.testing.assert_allclose(values[64:], 3e-5, rtol=0.01)
        np.testing.assert_array_equal(int4.quantize(values).codes, once.codes)

    def test_given_scales_are_kept_and_codes_saturate(self):
        w = jnp.array([[3.0], [-30.0], [0.5], [1.5], [2.5], [7.4], [7.6], [0.0]])
        scales = jnp.ones((1, 1), jnp.bfloat16)
        weight = int4.quantize(w, 8, scales)
        np.testing.assert_array_equal(weight.scales, scales)
        np.testing.assert_array_equal(
            int4.unpack(weight.codes).reshape(-1), [3, -7, 0, 2, 2, 7, 7, 0]
        )

    def test_groups_that_do_not_fit_raise(self):
        with self.assertRaisesRegex(ValueError, "groups of 32 do not divide 48 inputs"):
            int4.quantize(jnp.zeros((48, 2)))
        with self.assertRaisesRegex(ValueError, "groups of 4 do not"):
            int4.quantize(jnp.zeros((48, 2)), 4)


class LayoutTest(absltest.TestCase):
    def test_the_lowest_nibble_holds_the_first_weight(self):
        codes = jnp.array([-7, -1, 0, 1, 2, 3, 6, 7])[:, None]
        # Nibbles 1, 7, 8, 9, 10, 11, 14, 15 from the lowest up.
        word = np.array(0xFEBA9871, np.uint32).view(np.int32)
        np.testing.assert_array_equal(int4.pack(codes), [[word]])
        np.testing.assert_array_equal(int4.unpack(int4.pack(codes)), codes)

    def test_a_word_of_zeros_has_a_name(self):
        np.testing.assert_array_equal(int4.pack(jnp.zeros((16, 3), jnp.int32)), int4.ZERO_WORD)

    def test_the_weight_knows_its_shape_and_takes_four_and_a_half_bits(self):
        weight = int4.quantize(jnp.ones((3, 64, 5)))
        self.assertEqual(weight.shape, (3, 64, 5))
        self.assertEqual((weight.ndim, weight.group_size), (3, 32))
        self.assertEqual(weight.codes.nbytes + weight.scales.nbytes, 3 * 64 * 5 * 4.5 / 8)


if __name__ == "__main__":
    absltest.main()
