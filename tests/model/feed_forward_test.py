import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs import presets
from kimi_jax.model import feed_forward
from kimi_jax.model.feed_forward import FeedForwardParams


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


class FeedForwardTest(absltest.TestCase):
    def test_equals_the_equation_in_float64(self):
        rng = np.random.default_rng(0)
        gate, up, down = (rng.standard_normal(s) for s in ((4, 6), (4, 6), (6, 4)))
        x = rng.standard_normal((2, 3, 4))
        expected = (x @ gate * _sigmoid(x @ gate) * (x @ up)) @ down
        params = FeedForwardParams(*map(jnp.float32, (gate, up, down)))
        actual = feed_forward.feed_forward(params, jnp.float32(x))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    def test_the_written_gradient_is_that_of_the_parts(self):
        rng = np.random.default_rng(1)
        gate, up, dy = (jnp.float32(5 * rng.standard_normal((64,))) for _ in range(3))
        plain = jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)[1](dy)
        written = jax.vjp(feed_forward.swiglu, gate, up)[1](dy)
        for actual, expected in zip(written, plain, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

    def test_the_plan_has_the_given_width(self):
        plan = feed_forward.specs(presets.kimi_k2(), 18432)
        self.assertEqual(plan.w_gate.shape, (7168, 18432))
        self.assertEqual(plan.w_down.shape, (18432, 7168))


if __name__ == "__main__":
    absltest.main()
