import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.model import feed_forward
from kimi_jax.model.feed_forward import FeedForwardParams
from kimi_jax.parallel import rules
from tests.support import tiny
from tests.support.gradients import FLOAT32_TOLERANCE, assert_close, value_and_gradients


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _stored_as_fp8(values):
    return (values * 2.0**6).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**-6


def _tokens(x):
    return jax.reshard(jnp.float32(x), rules.TOKENS)


class FeedForwardTest(parameterized.TestCase):
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

    @parameterized.parameters(1, 2)
    def test_with_fp8_residuals_the_gradients_are_those_of_rounded_gate_and_up(self, tensor):
        rng = np.random.default_rng(2)
        x = rng.integers(-8, 9, (2, 3, 4)) / 8.0
        w_gate, w_up = (rng.integers(-4, 5, (4, 300)) / 8.0 for _ in range(2))
        # 7 is the largest of every tile, of the whole width or of a half: the scale is 2**-6.
        x[..., 0] = 7.0
        first_of_tiles = [0, 128, 150, 256, 278]
        w_gate[:, first_of_tiles], w_up[:, first_of_tiles] = 0, 0
        w_gate[0, first_of_tiles], w_up[0, first_of_tiles] = 1, 1
        w_down, dy = rng.standard_normal((300, 4)), rng.standard_normal(x.shape)
        params = FeedForwardParams(*map(jnp.float32, (w_gate, w_up, w_down)))

        def run(residuals):
            def layer(params, x):
                return feed_forward.feed_forward(params, x, residuals=residuals)

            with jax.set_mesh(tiny.mesh(1, 1, tensor=tensor)):
                layouts = rules.partition_specs(feed_forward.specs(tiny.MODEL, 300), rules.COMPUTE)
                arguments = jax.tree.map(jax.reshard, params, layouts), _tokens(x)
                return value_and_gradients(layer, arguments, _tokens(dy))

        (y, _), (rounded_y, (d_params, d_x)) = map(run, ResidualFormat)
        np.testing.assert_array_equal(y, rounded_y)
        gate, up = _stored_as_fp8(x @ w_gate), _stored_as_fp8(x @ w_up)
        d_hidden, sigmoid = dy @ w_down.T, _sigmoid(gate)
        d_gate = d_hidden * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        d_up = d_hidden * gate * sigmoid
        assert_close(d_params.w_gate, np.einsum("btd,btf->df", x, d_gate), FLOAT32_TOLERANCE)
        assert_close(d_params.w_up, np.einsum("btd,btf->df", x, d_up), FLOAT32_TOLERANCE)
        hidden = gate * sigmoid * up
        assert_close(d_params.w_down, np.einsum("btf,btd->fd", hidden, dy), FLOAT32_TOLERANCE)
        assert_close(d_x, d_gate @ w_gate.T + d_up @ w_up.T, FLOAT32_TOLERANCE)

    def test_the_plan_has_the_given_width(self):
        plan = feed_forward.specs(presets.kimi_k2(), 18432)
        self.assertEqual(plan.w_gate.shape, (7168, 18432))
        self.assertEqual(plan.w_down.shape, (18432, 7168))


if __name__ == "__main__":
    absltest.main()
