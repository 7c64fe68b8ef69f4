import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.model.linear import project
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import BATCH, REPLICATED
from tests.support import tiny

_SHAPES = {"b": 8, "t": 3, "d": 4, "n": 2, "h": 5, "w": 24}
_ROUNDING = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # relative to the largest value


def _arrays(equation, dtype):
    rng = np.random.default_rng(0)
    names = equation.replace("->", ",").split(",")
    return [jnp.asarray(rng.standard_normal([_SHAPES[i] for i in name]), dtype) for name in names]


def _value_and_gradients(equation, x, w, cotangent, fn):
    y, pull = jax.vjp(lambda x, w: fn(equation, x, w), x, w)
    return y, *pull(cotangent.astype(y.dtype))


class LinearTest(parameterized.TestCase):
    @parameterized.product(
        equation=["btd,dnh->btnh", "btnh,nhd->btd", "wd,dh->wh"],
        dtype=[jnp.float32, jnp.bfloat16],
        mesh_shape=[(1, 1), (2, 4)],
    )
    def test_product_and_gradients_are_those_of_float64(self, equation, dtype, mesh_shape):
        x, w, cotangent = _arrays(equation, dtype)
        operands, result = equation.split("->")
        x_indices, w_indices = operands.split(",")
        wide = [np.asarray(array, np.float64) for array in (x, w, cotangent)]
        expected = (
            np.einsum(equation, wide[0], wide[1]),
            np.einsum(f"{result},{w_indices}->{x_indices}", wide[2], wide[1]),
            np.einsum(f"{x_indices},{result}->{w_indices}", wide[0], wide[2]),
        )
        with jax.set_mesh(tiny.mesh(*mesh_shape)):
            x, cotangent = (jax.reshard(array, BATCH) for array in (x, cotangent))
            w = jax.reshard(w, REPLICATED)
            actual = jax.jit(_value_and_gradients, static_argnums=(0, 4))(
                equation, x, w, cotangent, project
            )
        for got, wanted in zip(actual, expected, strict=True):
            self.assertEqual(got.dtype, dtype)
            atol = _ROUNDING[dtype] * np.abs(wanted).max()
            np.testing.assert_allclose(np.float64(got), wanted, rtol=0, atol=atol)

    def test_it_also_runs_inside_per_device_code(self):
        x, w, _ = _arrays("wd,dh->wh", jnp.float32)

        def loss(x, w):
            body = per_shard(
                lambda x, w: project("wd,dh->wh", x, w),
                in_specs=(BATCH, REPLICATED),
                out_specs=BATCH,
            )
            return jnp.sum(jnp.sin(body(x, w)))

        with jax.set_mesh(tiny.mesh(2, 4)):
            gradient = jax.jit(jax.grad(loss, argnums=1))(jax.reshard(x, BATCH), w)
        expected = np.asarray(x).T @ np.cos(np.asarray(x) @ np.asarray(w))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

    def test_the_result_can_be_wider_than_its_operands(self):
        x, w, _ = _arrays("wd,dh->wh", jnp.bfloat16)
        self.assertEqual(project("wd,dh->wh", x, w, jnp.float32).dtype, jnp.float32)


if __name__ == "__main__":
    absltest.main()
