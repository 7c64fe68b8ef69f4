"""A pipeline computes what a loop over the layers computes, and keeps layers and rows in order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.parallel.pipeline import collect_layers, deal_layers, num_stages, pipeline
from kimi_jax.parallel.rules import TOKENS
from tests.support import tiny

LAYERS, ROWS, LENGTH, WIDTH = 8, 8, 2, 3


def layer(x, weights, shift):
    """Depends on the order of layers, and on each row's own shift; its statistic names the rows."""
    x = jnp.tanh(x * weights["scale"] + shift[..., None])
    return x, jnp.max(x, axis=(1, 2))


def loop(weights, x, shift):
    """The same in NumPy, float64."""
    maxima = []
    for scale in np.float64(weights["scale"]):
        x = np.tanh(x * scale + np.float64(shift)[..., None])
        maxima.append(np.max(x, axis=(1, 2)))
    return x, np.stack(maxima)


def inputs():
    random = np.random.default_rng(0)
    weights = {"scale": random.uniform(0.5, 1.5, (LAYERS, WIDTH)).astype(np.float32)}
    x = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    return weights, x, random.normal(size=(ROWS, LENGTH)).astype(np.float32)


def differences(fn, at, step=1e-6):
    """Central differences of a function of one array, value by value."""
    slopes = np.empty_like(at)
    for index in np.ndindex(at.shape):
        sides = []
        for sign in (1, -1):
            moved = at.copy()
            moved[index] += sign * step
            sides.append(fn(moved))
        slopes[index] = (sides[0] - sides[1]) / (2 * step)
    return slopes


@functools.partial(jax.jit, static_argnames="remat")
def run(weights, x, shift, remat):
    return pipeline(layer, deal_layers(weights), x, shift, remat=remat)


def run_on(mesh, remat, layout=TOKENS):
    weights, x, shift = inputs()
    with jax.set_mesh(mesh):
        x, shift = (jax.device_put(leaf, jax.NamedSharding(mesh, layout)) for leaf in (x, shift))
        return num_stages(), jax.device_get(run(weights, x, shift, remat))


class PipelineTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"pipe": 2},), ({"pipe": 8},), ({"pipe": 4, "data": 2},), ({"pipe": 2, "context": 2},)
    )
    def test_results_and_statistics_are_those_of_a_loop(self, axes):
        stages, (y, maxima) = run_on(tiny.mesh(**{"data": 1, "expert": 1} | axes), jax.checkpoint)
        wanted, wanted_maxima = loop(*inputs())
        self.assertEqual(stages, axes["pipe"])
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
        self.assertEqual(maxima.shape, (LAYERS, stages, ROWS // stages))
        np.testing.assert_allclose(maxima.reshape(LAYERS, ROWS), wanted_maxima, rtol=1e-5)

    @parameterized.parameters((P("pipe"),), (P("data"),), (P(),))
    def test_rows_may_be_split_over_one_axis_or_none(self, layout):
        mesh = tiny.mesh(2, 1, pipe=2)
        _, (y, _) = run_on(mesh, jax.checkpoint, layout)
        np.testing.assert_allclose(y, loop(*inputs())[0], rtol=1e-5, atol=1e-6)

    @parameterized.parameters((P(), P()), (P(None, ("data", "pipe")), P(None, "pipe", "data")))
    def test_layers_are_dealt_one_to_each_stage_in_turn_and_collected(self, stored, dealt):
        stack = np.arange(LAYERS * 4 * WIDTH).reshape(LAYERS, 4, WIDTH)
        mesh = tiny.mesh(2, 1, pipe=2)
        with jax.set_mesh(mesh):
            placed = jax.device_put(stack, jax.NamedSharding(mesh, stored))
            rounds = jax.jit(deal_layers)(placed)
            np.testing.assert_array_equal(rounds, stack.reshape(LAYERS // 2, 2, 4, WIDTH))
            wanted = jax.NamedSharding(mesh, P(None, "pipe", *dealt[2:]))
            self.assertTrue(rounds.sharding.is_equivalent_to(wanted, rounds.ndim))
            layout = P(*stored, *(None,) * (3 - len(stored)))
            back = jax.jit(lambda tree: collect_layers(tree, layout))(rounds)
        np.testing.assert_array_equal(back, stack)
        self.assertTrue(back.sharding.is_equivalent_to(placed.sharding, back.ndim))

    def test_gradients_are_those_of_a_loop(self):
        weights, x, shift = inputs()

        def total(weights, x):
            dealt = deal_layers(weights)
            y, maxima = pipeline(layer, dealt, x, shift_here, remat=lambda fn: fn)
            return jnp.sum(y**2) + jnp.sum(maxima)

        mesh = tiny.mesh(1, 1, pipe=4)
        with jax.set_mesh(mesh):
            at = jax.NamedSharding(mesh, TOKENS)
            shift_here = jax.device_put(shift, at)
            got = jax.jit(jax.grad(total, argnums=(0, 1)))(weights, jax.device_put(x, at))

        def total_of_loop(scale, x):
            y, maxima = loop({"scale": scale}, x, shift)
            return np.sum(y**2) + np.sum(maxima)

        scale, x = np.float64(weights["scale"]), np.float64(x)
        of_scale = differences(lambda moved: total_of_loop(moved, x), scale)
        of_x = differences(lambda moved: total_of_loop(scale, moved), x)
        np.testing.assert_allclose(got[0]["scale"], of_scale, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[1], of_x, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    absltest.main()
