import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.model import router
from kimi_jax.model.router import RouterParams

_CONFIG = dataclasses.replace(
    presets.tiny(vocab_size=64), embed_dim=8, num_routed_experts=8, experts_per_token=3
)


def _params(seed, bias=0.0):
    rng = np.random.default_rng(seed)
    return RouterParams(
        w_router=jnp.float32(rng.standard_normal((8, 8))),
        selection_bias=jnp.float32(bias * rng.standard_normal(8)),
    )


def _route_one(x, params, config):
    """Follows the equations for one token in float64."""
    scores = 1 / (1 + np.exp(-(x @ np.float64(params.w_router))))
    selection = scores + np.float64(params.selection_bias)
    groups = selection.reshape(config.num_expert_groups, -1)
    best_two = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
    allowed = np.argsort(-best_two)[: config.expert_groups_per_token]
    size = groups.shape[1]
    candidates = [e for e in range(8) if config.num_expert_groups == 1 or e // size in allowed]
    chosen = sorted(candidates, key=lambda e: -selection[e])[: config.experts_per_token]
    weights = scores[chosen] / scores[chosen].sum() * router.routed_scaling_factor(config)
    return dict(zip(chosen, weights, strict=True))


class RouterTest(parameterized.TestCase):
    @parameterized.parameters((1, 1, 0.0), (1, 1, 0.5), (4, 2, 0.5), (2, 1, 0.5), (4, 3, -2.0))
    def test_choices_and_weights_follow_the_equations(self, groups, per_token, bias):
        config = dataclasses.replace(
            _CONFIG, num_expert_groups=groups, expert_groups_per_token=per_token
        )
        params = _params(0, bias)
        x = np.random.default_rng(1).standard_normal((20, 8))
        routing = router.route(params, jnp.float32(x), config=config)
        for token in range(20):
            expected = _route_one(x[token], params, config)
            actual = dict(
                zip(routing.expert_ids[token].tolist(), routing.weights[token], strict=True)
            )
            self.assertEqual(set(actual), set(expected))
            for expert, weight in expected.items():
                np.testing.assert_allclose(actual[expert], weight, rtol=1e-5)

    def test_the_bias_decides_the_choice_but_not_the_weight(self):
        params = _params(0)
        x = jnp.float32(np.random.default_rng(1).standard_normal((4, 8)))
        forced = params.replace(selection_bias=jnp.float32([9, 9, 9, 0, 0, 0, 0, 0]))
        routing = router.route(forced, x, config=_CONFIG)
        self.assertEqual(set(np.asarray(routing.expert_ids).ravel().tolist()), {0, 1, 2})
        total = np.asarray(routing.weights).sum(axis=1)
        np.testing.assert_allclose(total, router.routed_scaling_factor(_CONFIG), rtol=1e-6)

    def test_the_bias_gets_no_gradient(self):
        x = jnp.float32(np.random.default_rng(1).standard_normal((4, 8)))

        def loss(params):
            return jnp.sum(router.route(params, x, config=_CONFIG).weights ** 2)

        gradients = jax.grad(loss)(_params(0, 0.1))
        np.testing.assert_array_equal(gradients.selection_bias, 0.0)
        self.assertGreater(float(jnp.max(jnp.abs(gradients.w_router))), 0.0)

    def test_routing_is_float32_for_bfloat16_tokens(self):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8)), jnp.bfloat16)
        routing = router.route(_params(0), x, config=_CONFIG)
        exact = router.route(_params(0), x.astype(jnp.float32), config=_CONFIG)
        self.assertEqual(routing.weights.dtype, jnp.float32)
        np.testing.assert_array_equal(routing.weights, exact.weights)

    @parameterized.parameters((384, 8, 2.827), (64, 6, 2.446))
    def test_the_monte_carlo_rule_gives_the_published_factors(self, experts, chosen, published):
        factor = router.monte_carlo_scaling_factor(experts, chosen)
        self.assertAlmostEqual(factor, published, delta=2e-3)

    def test_a_configured_factor_is_used(self):
        self.assertEqual(router.routed_scaling_factor(presets.kimi_k2()), 2.827)


if __name__ == "__main__":
    absltest.main()
