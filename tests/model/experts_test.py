import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.configs.compute import Implementation
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, ROUTED_EXPERT, count_parameters
from kimi_jax.model import experts
from tests.support.gradients import FLOAT32_TOLERANCE, assert_close, value_and_gradients
from tests.support.swiglu_oracle import swiglu_oracle

CONFIG = ModelConfig(
    vocab_size=32,
    embed_dim=12,
    num_layers=2,
    num_dense_layers=1,
    num_heads=2,
    q_latent_dim=8,
    kv_latent_dim=8,
    head_nope_dim=4,
    head_rope_dim=2,
    head_value_dim=4,
    dense_ffn_dim=16,
    expert_ffn_dim=6,
    num_routed_experts=5,
    num_shared_experts=1,
    experts_per_token=3,
)


class SpecsTest(absltest.TestCase):
    def test_plan_has_the_shapes_axes_and_tags_of_routed_experts(self):
        plan = experts.specs(CONFIG)
        self.assertEqual(plan.w_gate.shape, (5, 12, 6))
        self.assertEqual(plan.w_gate.axes, (ax.EXPERTS, ax.EMBED, ax.EXPERT_FFN))
        self.assertEqual(plan.w_gate.inputs, (ax.EMBED,))
        self.assertEqual(plan.w_down.shape, (5, 6, 12))
        self.assertEqual(plan.w_down.inputs, (ax.EXPERT_FFN,))
        self.assertEqual(plan.w_up.tags, {MATRIX, ROUTED_EXPERT})
        self.assertEqual(count_parameters(plan), 3 * 5 * 12 * 6)


class ExpertsTest(absltest.TestCase):
    def test_sum_and_gradients_equal_a_loop_over_experts_in_float64(self):
        rng = np.random.default_rng(0)
        shapes = [(21, 12), (5, 12, 6), (5, 12, 6), (5, 6, 12), (21, 3)]
        operands = [rng.standard_normal(shape) for shape in shapes]
        ids = rng.integers(-1, 6, (21, 3))
        d_y = rng.standard_normal((21, 12))
        x, gate, up, down, weights = (jnp.asarray(a, jnp.float32) for a in operands)
        params = experts.ExpertParams(w_gate=gate, w_up=up, w_down=down)
        for implementation in (Implementation.AUTO, Implementation.REFERENCE):
            y, (d_params, d_x, d_weights) = value_and_gradients(
                lambda p, x, w, chosen=implementation: experts.experts(
                    p, x, jnp.asarray(ids, jnp.int32), w, implementation=chosen
                ),
                (params, x, weights),
                jnp.asarray(d_y, jnp.float32),
            )
            actual = (y, d_x, d_params.w_gate, d_params.w_up, d_params.w_down, d_weights)
            for a, b in zip(actual, swiglu_oracle(operands, ids, d_y), strict=True):
                assert_close(a, b, FLOAT32_TOLERANCE)

    def test_shards_of_experts_add_up_to_all_of_them(self):
        rng = np.random.default_rng(1)
        x, weights = rng.standard_normal((9, 12)), rng.random((9, 3))
        ids = jnp.asarray(rng.integers(0, 4, (9, 3)), jnp.int32)
        params = experts.ExpertParams(
            w_gate=rng.standard_normal((4, 12, 6)),
            w_up=rng.standard_normal((4, 12, 6)),
            w_down=rng.standard_normal((4, 6, 12)),
        )
        params, x, weights = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float32), (params, x, weights)
        )
        whole = experts.experts(params, x, ids, weights)
        halves = [
            experts.experts(
                jax.tree.map(lambda w, at=first: w[at : at + 2], params), x, ids - first, weights
            )
            for first in (0, 2)
        ]
        assert_close(halves[0] + halves[1], whole, FLOAT32_TOLERANCE)


if __name__ == "__main__":
    absltest.main()
