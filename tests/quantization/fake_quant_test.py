import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import FakeQuantized, dense, fake_quant, straight_through


def _weights(dtype):
    return 0.02 * jax.random.normal(jax.random.key(0), (3, 512, 128), jnp.float32).astype(dtype)


class FakeQuantTest(parameterized.TestCase):
    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_values_are_those_of_codes_and_scales_in_the_weights_dtype(self, dtype):
        w = _weights(dtype)
        rounded = jax.jit(fake_quant)(w)
        self.assertEqual(rounded.dtype, dtype)
        np.testing.assert_array_equal(rounded, int4.dequantize(int4.quantize(w), dtype))

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_the_gradient_is_the_identity_for_every_weight(self, dtype):
        w, d = _weights(dtype), _weights(dtype)[::-1]
        groups = w.astype(jnp.float32).reshape(3, 16, 32, 128)
        scales = int4.group_scales(groups).astype(jnp.float32)[:, :, None]
        over_seven = jnp.abs(groups) > 7.0 * scales
        self.assertGreater(int(jnp.sum(over_seven)), 1000)  # which |w / s| <= 7 would have masked
        _, pullback = jax.vjp(jax.jit(fake_quant), w)
        np.testing.assert_array_equal(pullback(d)[0], d)

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_saturated_weights_alone_get_no_gradient(self, dtype):
        w = jnp.array([0.0, 7.0, 7.25, 7.75, -7.25, -8.0, 100.0, -1.0], dtype)[:, None]
        scales = jnp.ones((1, 1), jnp.bfloat16)

        def total(w):
            return jnp.sum(fake_quant(w, 8, scales).astype(jnp.float32))

        np.testing.assert_array_equal(
            jax.grad(total)(w)[:, 0].astype(jnp.float32), [1, 1, 1, 0, 1, 0, 0, 1]
        )

    def test_both_rules_agree_where_each_group_has_its_own_scale(self):
        w = _weights(jnp.float32)
        scales = int4.quantize(w).scales
        own = jax.vjp(fake_quant, w)
        given = jax.vjp(lambda w: fake_quant(w, scales=scales), w)
        np.testing.assert_array_equal(own[0], given[0])
        np.testing.assert_array_equal(own[1](w)[0], given[1](w)[0])


class StraightThroughTest(absltest.TestCase):
    def test_values_go_forward_and_gradients_to_the_carrier(self):
        carrier, values = jnp.full((2, 3), jnp.nan), jnp.ones((2, 3))
        out, pullback = jax.vjp(straight_through, carrier, values)
        np.testing.assert_array_equal(out, values)
        d_carrier, d_values = pullback(jnp.full((2, 3), 5.0))
        np.testing.assert_array_equal(d_carrier, 5.0)
        np.testing.assert_array_equal(d_values, 0.0)

    def test_dense_gives_the_values_of_a_weight_in_any_form(self):
        w = _weights(jnp.bfloat16)
        rounded = int4.quantize(w)
        values = int4.dequantize(rounded, jnp.bfloat16)
        carrier = jnp.zeros_like(w)
        np.testing.assert_array_equal(dense(w, jnp.bfloat16), w)
        np.testing.assert_array_equal(dense(rounded, jnp.bfloat16), values)
        np.testing.assert_array_equal(dense(FakeQuantized(carrier, rounded), jnp.bfloat16), values)


if __name__ == "__main__":
    absltest.main()
