"""The router: which experts a token goes to, and with what weight.

It runs in float32 whatever the compute dtype is, because ties decide experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, ROUTER, SELECTION_BIAS, Leaf, ParamSpec

_RENORMALISATION_EPS = 1e-20  # of the published code; scores are positive, so it only guards


@struct.dataclass
class RouterParams:
    """Weights of one router."""

    w_router: Leaf  # [D, E]
    selection_bias: Leaf  # [E], added for choosing only; moved by the balancing rule


@struct.dataclass
class Routing:
    """Where each token goes."""

    expert_ids: Leaf  # [W, K] int32
    weights: Leaf  # [W, K] float32, the routed scaling factor included
    scores: Leaf  # [W, E] float32, sigmoid of the logits


def specs(config: ModelConfig) -> RouterParams:
    """Plans one router."""
    return RouterParams(
        w_router=ParamSpec(
            shape=(config.embed_dim, config.num_routed_experts),
            axes=(ax.EMBED, ax.ROUTES),
            init=jax.nn.initializers.normal(config.init_std),
            tags=frozenset({MATRIX, ROUTER}),
            inputs=(ax.EMBED,),
        ),
        selection_bias=ParamSpec(
            shape=(config.num_routed_experts,),
            axes=(ax.ROUTES,),
            init=jax.nn.initializers.zeros,
            tags=frozenset({SELECTION_BIAS}),
        ),
    )


@jax.named_scope("router")
def route(params: RouterParams, x: Float[Array, "W D"], *, config: ModelConfig) -> Routing:
    """Chooses experts_per_token experts for each token.

    g = sigmoid(x W_router); sel = top_K(g + bias), within the best groups where there are groups;
    w_i = g_i / sum_sel(g) * routed_scaling_factor (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    logits = jnp.einsum(
        "wd,de->we", x.astype(jnp.float32), params.w_router, precision=jax.lax.Precision.HIGHEST
    )
    scores = jax.nn.sigmoid(logits)
    selection = jax.lax.stop_gradient(scores) + params.selection_bias
    if config.num_expert_groups > 1:
        selection = _limit_to_best_groups(selection, config)
    _, expert_ids = jax.lax.top_k(selection, config.experts_per_token)
    chosen = jnp.take_along_axis(scores, expert_ids, axis=-1)
    weights = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + _RENORMALISATION_EPS)
    return Routing(
        expert_ids=expert_ids, weights=weights * routed_scaling_factor(config), scores=scores
    )


def _limit_to_best_groups(
    selection: Float[Array, "W E"], config: ModelConfig
) -> Float[Array, "W E"]:
    """Rules out all but the best groups; a group's score is the sum of its best two."""
    grouped = selection.reshape(selection.shape[0], config.num_expert_groups, -1)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, config.expert_groups_per_token)
    kept = jnp.any(best[:, :, None] == jnp.arange(config.num_expert_groups), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(selection.shape)


def routed_scaling_factor(config: ModelConfig) -> float:
    """Returns the configured factor, or Moonlight's rule for this number of experts."""
    if config.routed_scaling_factor is not None:
        return config.routed_scaling_factor
    return monte_carlo_scaling_factor(config.num_routed_experts, config.experts_per_token)


@functools.cache
def monte_carlo_scaling_factor(num_routed_experts: int, experts_per_token: int) -> float:
    """Returns the factor that keeps the routed sum's scale at that of a single expert.

    The mean of 1 / sqrt(sum p^2) over tokens, p the renormalised top-K of sigmoid(N(0, 1)) scores
    (arXiv 2502.16982, figure 6): 2.827 for 384 experts top-8, 2.446 for 64 top-6.
    """
    trials = 20_000
    logits = np.random.default_rng(0).standard_normal((trials, num_routed_experts))
    top = np.sort(1 / (1 + np.exp(-logits)), axis=1)[:, -experts_per_token:]
    shares = top / top.sum(axis=1, keepdims=True)
    return float(np.mean(1 / np.sqrt(np.sum(shares**2, axis=1))))
