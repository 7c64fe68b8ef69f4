"""The mixture against a loop over tokens and their experts in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.core import param_spec
from kimi_jax.model import moe, router
from kimi_jax.parallel import placement, rules
from tests.support import tiny

_CHOICES = ComputeConfig(dtype=ComputeDtype.FLOAT32)
_ROWS, _LENGTH = 8, 4


def _params(config, seed=0):
    rng = np.random.default_rng(seed)
    return param_spec.map_specs(
        lambda spec: np.float32(rng.standard_normal(spec.shape) * 0.3), moe.specs(config)
    )


def _swiglu(x, gate, up, down):
    return (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


def _reference(params, x, config):
    p = jax.tree.map(np.float64, params)
    tokens = x.reshape(-1, x.shape[-1])
    out, load = np.zeros_like(tokens), np.zeros(config.num_routed_experts)
    for w, token in enumerate(tokens):
        scores = 1 / (1 + np.exp(-(token @ p.router.w_router)))
        chosen = np.argsort(-(scores + p.router.selection_bias))[: config.experts_per_token]
        shares = scores[chosen] / scores[chosen].sum() * router.routed_scaling_factor(config)
        load[chosen] += 1
        for expert, share in zip(chosen, shares, strict=True):
            e = p.experts
            out[w] += share * _swiglu(token, e.w_gate[expert], e.w_up[expert], e.w_down[expert])
        if p.shared is not None:
            out[w] += _swiglu(token, p.shared.w_gate, p.shared.w_up, p.shared.w_down)
    return out.reshape(x.shape), load


def _run(params, x, config, mesh_shape):
    mesh = tiny.mesh(*mesh_shape)
    plan = moe.specs(config)

    @jax.jit
    def run(params, x):
        gathered = placement.to_compute(params, plan, jnp.float32)
        return moe.moe(gathered, x, config=config, choices=_CHOICES)

    with jax.set_mesh(mesh):
        layouts = rules.partition_specs(plan, rules.STORAGE)
        stored = jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, layouts
        )
        x = jax.device_put(jnp.float32(x), jax.NamedSharding(mesh, rules.TOKENS))
        return run(stored, x)


class MoeTest(parameterized.TestCase):
    @parameterized.product(mesh_shape=[(1, 1), (2, 4)], num_shared_experts=[0, 2])
    def test_output_and_load_follow_the_equations(self, mesh_shape, num_shared_experts):
        config = dataclasses.replace(tiny.MODEL, num_shared_experts=num_shared_experts)
        params = _params(config)
        x = np.random.default_rng(1).standard_normal((_ROWS, _LENGTH, config.embed_dim))
        y, stats = _run(params, x, config, mesh_shape)
        expected, load = _reference(params, x, config)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.asarray(stats.expert_load).sum(axis=0), load)

    def test_the_balance_loss_is_1_for_an_even_load_and_more_otherwise(self):
        config = tiny.MODEL
        experts, chosen = config.num_routed_experts, config.experts_per_token
        even = np.zeros((1, experts, experts), np.float32)
        for t in range(experts):
            even[0, t, [t, (t + 1) % experts]] = 1
        uniform = np.full((1, experts, experts), 0.5, np.float32)
        loss = functools.partial(moe.sequence_balance_loss, config=config)
        loss_of_even = loss(jnp.asarray(uniform), jnp.asarray(even))
        np.testing.assert_allclose(loss_of_even, 1.0, rtol=1e-6)
        one_sided = np.zeros_like(even)
        one_sided[..., :chosen] = 1
        scores = np.where(one_sided > 0, 0.9, 0.1).astype(np.float32)
        expected = experts / chosen * chosen * 0.9 / (chosen * 0.9 + (experts - chosen) * 0.1)
        actual = loss(jnp.asarray(scores), jnp.asarray(one_sided))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_the_balance_losss_gradient_lowers_the_scores_of_busy_experts(self):
        config = tiny.MODEL
        chosen = jnp.zeros((1, 4, config.num_routed_experts)).at[..., :2].set(1)
        scores = jnp.full(chosen.shape, 0.5)
        loss = lambda s: jnp.sum(moe.sequence_balance_loss(s, chosen, config=config))  # noqa: E731
        gradient = np.asarray(jax.grad(loss)(scores))
        self.assertTrue(np.all(gradient[..., :2] > 0))
        self.assertTrue(np.all(gradient[..., 2:] < 0))


if __name__ == "__main__":
    absltest.main()
