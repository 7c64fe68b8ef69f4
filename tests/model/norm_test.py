import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.model import norm


class NormTest(absltest.TestCase):
    def test_equals_the_equation_in_float64(self):
        rng = np.random.default_rng(0)
        x, gain = rng.standard_normal((2, 3, 8)), rng.standard_normal(8)
        expected = gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)
        actual = norm.rms_norm(jnp.float32(gain), jnp.float32(x), eps=1e-3)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_epsilon_decides_the_size_of_small_inputs(self):
        x = np.full((1, 4), 1e-3, np.float32)
        small = norm.rms_norm(jnp.ones(4), jnp.asarray(x), eps=1e-6)
        np.testing.assert_allclose(small, 1 / np.sqrt(2), rtol=1e-5)

    def test_bfloat16_inputs_are_normalised_in_float32(self):
        x = jnp.full((1, 256), 3e4, jnp.bfloat16)  # the sum of squares would lose its last terms
        y = norm.rms_norm(jnp.ones(256), x, eps=1e-6)
        self.assertEqual(y.dtype, jnp.bfloat16)
        np.testing.assert_array_equal(np.float32(y), 1.0)


if __name__ == "__main__":
    absltest.main()
