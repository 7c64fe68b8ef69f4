import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from kimi_jax.core.trees import leaf_names
from kimi_jax.model import transformer
from kimi_jax.parallel.placement import initialize
from kimi_jax.training import step as steps
from kimi_jax.training.state import abstract_state
from tests.support import tiny

# float32 sums in another order. Gradients: relative to the largest value of the leaf; measured
# 1.7e-6. Parameters: absolute; a step moves them by 1e-2, and Newton-Schulz enlarges differences in
# small singular values; measured 4.3e-7.
GRADIENT_TOLERANCE = 1e-5
PARAMETER_TOLERANCE = 5e-6
LOSS_TOLERANCE = 2e-6  # relative; measured 4e-7
THRESHOLD = 3.2  # of QK-clip: between the maxima of the six heads at initialisation
# Compiling takes nearly all of the time.
_QUICK = {"xla_backend_optimization_level": 0}


def recording(inner):
    """Keeps the gradients beside the optimizer's state, for the test to read."""

    def init(params):
        return {**inner.init(params), "gradients": jax.tree.map(jnp.zeros_like, params)}

    def update(gradients, state, params):
        state = {name: value for name, value in state.items() if name != "gradients"}
        updates, state = inner.update(gradients, state, params)
        return updates, {**state, "gradients": gradients}

    return optax.GradientTransformation(init, update)


@functools.cache
def initial_parameters():
    with jax.set_mesh(tiny.mesh(1, 1)):
        key = jax.random.key(0)
        return jax.device_get(
            jax.jit(functools.partial(initialize, plan=transformer.specs(tiny.MODEL)))(key)
        )


def start(config, plan, mesh, transformation):
    """The state of step 0: the same parameters on every mesh, and zeros."""
    like = abstract_state(config, plan, transformation, mesh)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    state = state.replace(params=initial_parameters())
    return jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), state, like)


@functools.cache
def first_step(data, expert, accumulation_steps):
    """State, metrics and number of compilations after the same first step on some mesh."""
    config = tiny.experiment(
        training={"accumulation_steps": accumulation_steps},
        optimizer={"qk_clip_threshold": THRESHOLD, "balance_loss_weight": 0.01},
    )
    plan = transformer.specs(tiny.MODEL)
    mesh = tiny.mesh(data, expert)
    with jax.set_mesh(mesh):
        transformation = recording(steps.make_optimizer(config, plan))
        state = start(config, plan, mesh, transformation)
        take = jax.jit(
            functools.partial(
                steps.train_step, config=config, plan=plan, transformation=transformation
            ),
            compiler_options=_QUICK,
        )
        after, metrics = take(state, tiny.batch(mesh))
        kept = {"gradients": state.optimizer["gradients"]}  # of the test, in the layout of before
        take(after.replace(optimizer=after.optimizer | kept), tiny.batch(mesh, seed=1))
        return jax.device_get((after, metrics)), take._cache_size()


class StepTest(parameterized.TestCase):
    @parameterized.parameters((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 4, 4))
    def test_first_step_is_that_of_one_device(self, *layout):
        (expected, expected_metrics), _ = first_step(1, 1, 1)
        (state, metrics), compilations = first_step(*layout)
        self.assertEqual(compilations, 1)
        gradients = expected.optimizer["gradients"]
        named = zip(
            jax.tree.leaves(leaf_names(gradients)),
            jax.tree.leaves(gradients),
            jax.tree.leaves(state.optimizer["gradients"]),
            strict=True,
        )
        for name, wanted, got in named:
            with self.subTest(name):
                scale = np.max(np.abs(wanted))
                np.testing.assert_allclose(got, wanted, rtol=0, atol=GRADIENT_TOLERANCE * scale)
        for name in ("loss/train", "loss/balance", "optimizer/gradient_norm", "max_logit"):
            np.testing.assert_allclose(
                metrics[name], expected_metrics[name], rtol=LOSS_TOLERANCE, err_msg=name
            )
        for name in ("expert_load", "clipped_ever", "qk_clip/heads_clipped"):
            np.testing.assert_array_equal(metrics[name], expected_metrics[name], err_msg=name)
        chex.assert_trees_all_close(state.params, expected.params, rtol=0, atol=PARAMETER_TOLERANCE)

    def test_every_parameter_has_a_gradient_but_the_selection_bias(self):
        (state, _), _ = first_step(1, 1, 1)
        gradients = state.optimizer["gradients"]
        names, leaves = jax.tree.leaves(leaf_names(gradients)), jax.tree.leaves(gradients)
        still = [n for n, leaf in zip(names, leaves, strict=True) if not np.any(leaf)]
        self.assertEqual(still, ["moe_blocks.feed_forward.router.selection_bias"])

    def test_loss_weights_differ_so_much_that_a_mean_of_means_would_be_seen(self):
        weights = tiny.host_batch().weights
        totals = [weights[start::4].sum() for start in range(4)]
        self.assertGreater(max(totals), 10 * min(totals))

    def test_some_heads_are_clipped_and_some_are_not(self):
        (state, metrics), _ = first_step(1, 1, 1)
        over = metrics["max_logit"] > THRESHOLD
        self.assertTrue(0 < over.sum() < over.size)
        np.testing.assert_array_equal(state.clipped_ever, over)
        self.assertEqual(metrics["qk_clip/heads_clipped"], over.sum())
        self.assertEqual(metrics["qk_clip/max_logit"], metrics["max_logit"].max())

    def test_every_assignment_is_counted_once(self):
        (_, metrics), _ = first_step(2, 4, 4)
        assignments = tiny.NUM_ROWS * tiny.LENGTH * tiny.MODEL.experts_per_token
        np.testing.assert_array_equal(metrics["expert_load"].sum(axis=1), assignments)

    def test_selection_biases_move_by_the_rule_alone(self):
        (state, metrics), _ = first_step(1, 1, 1)
        load = metrics["expert_load"].astype(np.float64)
        direction = np.sign(load.mean(axis=1, keepdims=True) - load)
        rate = tiny.experiment().optimizer.selection_bias_rate
        wanted = rate * (direction - direction.mean(axis=1, keepdims=True))
        bias = state.params.moe_blocks.feed_forward.router.selection_bias
        np.testing.assert_allclose(bias, wanted, rtol=0, atol=1e-9)
        self.assertGreater(np.abs(bias).max(), 0)


if __name__ == "__main__":
    absltest.main()
