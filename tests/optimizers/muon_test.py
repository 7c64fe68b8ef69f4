import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from kimi_jax.configs.optimizer import (
    MatrixGranularity,
    MomentumDtype,
    NewtonSchulzDtype,
    NewtonSchulzPreset,
    OptimizerConfig,
    ScheduleConfig,
)
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core import param_spec
from kimi_jax.core.param_spec import named_specs
from kimi_jax.optimizers.muon import scale_by_muon
from kimi_jax.parallel.mesh import MESH_AXES, make_mesh
from kimi_jax.parallel.rules import STORAGE, partition_specs
from tests.optimizers import toy_plans

FUSED, HEAD = MatrixGranularity.FUSED, MatrixGranularity.HEAD

# Five Newton-Schulz steps in float32 against float64, updates of rms 0.2.
FLOAT32_ATOL = 2e-5


def config(**options) -> OptimizerConfig:
    options = {"newton_schulz_dtype": NewtonSchulzDtype.FLOAT32} | options
    return OptimizerConfig(schedule=ScheduleConfig(peak=1.0), **options)


def orthogonal(matrix, steps=5, update_rms=0.2):
    """Jordan's iteration and Moonlight's scale for one matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * update_rms * np.sqrt(max(matrix.shape))


class MuonTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.plan = toy_plans.attention_plan()
        self.plan = {name: self.plan[name] for name in self.plan if not name.endswith("norm")}
        self.gradients = [toy_plans.random_like(self.plan, seed=s) for s in range(3)]

    def run_steps(self, optimizer_config):
        optimizer = scale_by_muon(optimizer_config, self.plan)
        state = optimizer.init(self.gradients[0])
        for gradients in self.gradients:
            updates, state = jax.jit(optimizer.update)(gradients, state)
        return updates, state

    def lookahead(self, name, nesterov, mu=0.95):
        momentum = 0.0
        for gradients in self.gradients:
            gradient = np.asarray(gradients[name], np.float64)
            momentum = mu * momentum + gradient
        return gradient + mu * momentum if nesterov else momentum

    @parameterized.parameters(True, False)
    def test_update_equals_the_float64_rule(self, nesterov):
        updates, _ = self.run_steps(config(nesterov=nesterov))
        for name, update in updates.items():
            rows = 8 if name == "w_out" else update.shape[0]  # w_out [N, U, D]
            expected = orthogonal(self.lookahead(name, nesterov).reshape(rows, -1))
            np.testing.assert_allclose(
                update.reshape(rows, -1), expected, atol=FLOAT32_ATOL, err_msg=name
            )

    def test_fused_projections_are_one_matrix(self):
        updates, _ = self.run_steps(config(matrix_granularity=FUSED))
        nope = self.lookahead("w_q_nope", nesterov=True).reshape(8, -1)
        rope = self.lookahead("w_q_rope", nesterov=True).reshape(8, -1)
        expected = orthogonal(np.concatenate([nope, rope], axis=1))
        ours = np.concatenate(
            [updates["w_q_nope"].reshape(8, -1), updates["w_q_rope"].reshape(8, -1)], axis=1
        )
        np.testing.assert_allclose(ours, expected, atol=FLOAT32_ATOL)

    def test_heads_are_apart_where_asked(self):
        updates, _ = self.run_steps(config(matrix_granularity=HEAD))
        value = self.lookahead("w_value", nesterov=True)  # [C, N, U]
        for head in range(2):
            np.testing.assert_allclose(
                updates["w_value"][:, head], orthogonal(value[:, head]), atol=FLOAT32_ATOL
            )

    def test_options_act(self):
        plan = {"w_out": self.plan["w_out"]}
        gradients = {"w_out": self.gradients[0]["w_out"]}

        def second_update(**options):
            optimizer = scale_by_muon(config(**options), plan)
            _, state = optimizer.update(gradients, optimizer.init(gradients))
            return optimizer.update({"w_out": self.gradients[1]["w_out"]}, state)[0]["w_out"]

        update = second_update()
        for options in (
            {"momentum": 0.5},
            {"newton_schulz_steps": 3},
            {"newton_schulz_preset": NewtonSchulzPreset.YOU},
            {"newton_schulz_dtype": NewtonSchulzDtype.BFLOAT16},
            {"update_rms": 0.4},
        ):
            difference = jnp.max(jnp.abs(second_update(**options) - update))
            self.assertGreater(float(difference), 1e-4, options)

    def test_momentum_is_a_heavy_ball(self):
        _, state = self.run_steps(config())
        momentum = self.lookahead("w_out", nesterov=False)
        np.testing.assert_allclose(state.momentum["w_out"], momentum, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(True, False)
    def test_momentum_in_bfloat16_is_rounded_once_and_only_when_stored(self, nesterov):
        mu = np.float32(0.95)
        updates, state = self.run_steps(
            config(momentum_dtype=MomentumDtype.BFLOAT16, nesterov=nesterov)
        )
        for name, update in updates.items():
            stored = np.zeros(update.shape, jnp.bfloat16)
            for gradients in self.gradients:
                gradient = np.asarray(gradients[name], np.float64)
                momentum = mu * stored.astype(np.float64) + gradient
                stored = momentum.astype(np.float32).astype(jnp.bfloat16)
            ahead = gradient + mu * momentum if nesterov else momentum
            rows = 8 if name == "w_out" else update.shape[0]
            self.assertEqual(state.momentum[name].dtype, jnp.bfloat16)
            np.testing.assert_array_equal(state.momentum[name], stored, err_msg=name)
            np.testing.assert_allclose(
                update.reshape(rows, -1),
                orthogonal(ahead.reshape(rows, -1)),
                atol=FLOAT32_ATOL,
                err_msg=name,
            )

    @parameterized.parameters(list(NewtonSchulzDtype))
    def test_updates_keep_the_format_of_the_products(self, dtype):
        updates, state = self.run_steps(config(newton_schulz_dtype=dtype))
        self.assertEqual({leaf.dtype for leaf in updates.values()}, {jnp.dtype(dtype.value)})
        self.assertEqual({leaf.dtype for leaf in state.momentum.values()}, {jnp.dtype("float32")})

    @parameterized.product(
        mesh=[(1, 1, 1, 1, 1, 1), (1, 2, 1, 4, 1, 1), (2, 1, 1, 1, 2, 2)],
        granularity=[FUSED, HEAD],
    )
    def test_mesh_does_not_change_the_update(self, mesh, granularity):
        plan = {
            "dense": param_spec.stack(self.plan, 1),
            "moe": param_spec.stack(self.plan, 2),
            "experts": toy_plans.model_plan()["moe_blocks"]["feed_forward"]["experts"],
        }
        optimizer = scale_by_muon(config(matrix_granularity=granularity), plan)
        gradients = toy_plans.random_like(plan, seed=0)
        expected, _ = jax.jit(optimizer.update)(gradients, optimizer.init(gradients))
        axes = dict(zip(MESH_AXES, mesh, strict=True))
        with jax.set_mesh(make_mesh(ParallelConfig(**axes), 4)):
            stored = jax.device_put(gradients, partition_specs(plan, STORAGE))
            updates, _ = jax.jit(optimizer.update)(stored, optimizer.init(stored))
            for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(stored), strict=True):
                self.assertTrue(update.sharding.is_equivalent_to(leaf.sharding, leaf.ndim))
        chex.assert_trees_all_close(
            jax.device_get(updates), jax.device_get(expected), atol=FLOAT32_ATOL
        )

    def test_masked_leaves_pass_through(self):
        plan = toy_plans.attention_plan()
        masked = {
            name: optax.MaskedNode() if spec.kind == "norm" else jnp.ones(spec.shape)
            for name, spec in named_specs(plan)
        }
        optimizer = scale_by_muon(config(), plan)
        updates, _ = jax.jit(optimizer.update)(masked, optimizer.init(masked))
        chex.assert_trees_all_equal_structs(updates, masked)


if __name__ == "__main__":
    absltest.main()
