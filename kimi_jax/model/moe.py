"""The mixture of experts: router, routed experts, shared expert."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.param_spec import Leaf
from kimi_jax.model import experts, feed_forward, router
from kimi_jax.parallel import rules
from kimi_jax.parallel.collectives import mean_of_positions_per_shard
from kimi_jax.parallel.expert_exchange import exchange_per_shard
from kimi_jax.parallel.per_shard import per_shard


@struct.dataclass
class MoeParams:
    """Weights of one mixture."""

    router: router.RouterParams
    experts: experts.ExpertParams
    shared: feed_forward.FeedForwardParams | None  # None without shared experts


@struct.dataclass
class MoeStats:
    """What routing did."""

    expert_load: Leaf  # [shards, E] float32: tokens each shard of them sent to each expert
    dropped: Leaf  # [shards] float32: assignments that found no room in the exchange
    balance_loss: Leaf  # [B] float32


def specs(config: ModelConfig) -> MoeParams:
    """Plans one mixture."""
    shared_width = config.num_shared_experts * config.expert_ffn_dim
    return MoeParams(
        router=router.specs(config),
        experts=experts.specs(config),
        shared=feed_forward.specs(config, shared_width) if shared_width else None,
    )


@jax.named_scope("moe")
def moe(
    params: MoeParams, x: Float[Array, "B T D"], *, config: ModelConfig, choices: ComputeConfig
) -> tuple[Float[Array, "B T D"], MoeStats]:
    """Returns sum_k w_k E_k(x) + E_shared(x), the shared expert unscaled, and what routing did.

    The width M of experts may be split over the tensor axis: partial sums are all-reduced.
    """
    stats_layout = MoeStats(
        expert_load=rules.TOKEN_SHARDS, dropped=rules.TOKEN_SHARDS, balance_loss=rules.BATCH
    )
    routed = per_shard(
        functools.partial(_routed_per_shard, config=config, choices=choices),
        in_specs=(
            rules.REPLICATED,
            rules.partition_specs(experts.specs(config), rules.COMPUTE),
            rules.TOKENS,
        ),
        out_specs=(rules.PARTIAL_TOKENS, stats_layout),
    )
    parts, stats = routed(params.router, params.experts, x)
    y = jnp.sum(parts, axis=0)
    if params.shared is not None:
        with jax.named_scope("shared_expert"):
            y = y + feed_forward.feed_forward(
                params.shared, x, residuals=choices.feed_forward_residuals
            )
    return y, stats


def _routed_per_shard(
    router_params: router.RouterParams,
    expert_params: experts.ExpertParams,
    x: Float[Array, "b T D"],
    *,
    config: ModelConfig,
    choices: ComputeConfig,
) -> tuple[Float[Array, "1 b T D"], MoeStats]:
    """Routes this device's tokens and computes its part of the routed experts' sum for them."""
    tokens = x.reshape(-1, x.shape[-1])
    routing = router.route(router_params, tokens, config=config)
    y, dropped = exchange_per_shard(
        functools.partial(
            experts.experts,
            expert_params,
            implementation=choices.implementation,
            residuals=choices.feed_forward_residuals,
        ),
        tokens,
        routing.expert_ids,
        routing.weights,
        num_local_experts=expert_params.w_gate.shape[0],
        choices=choices,
    )
    chosen = _one_hot_sum(routing.expert_ids, config.num_routed_experts)
    per_sequence = (x.shape[0], x.shape[1], config.num_routed_experts)
    balance = sequence_balance_loss(
        routing.scores.reshape(per_sequence),
        chosen.reshape(per_sequence),
        config=config,
        mean=mean_of_positions_per_shard,
    )
    stats = MoeStats(
        expert_load=jnp.sum(chosen, axis=0)[None], dropped=dropped[None], balance_loss=balance
    )
    return y.reshape(1, *x.shape), stats


def _one_hot_sum(expert_ids: Array, num_experts: int) -> Float[Array, "W E"]:
    hits = expert_ids[:, :, None] == jnp.arange(num_experts)
    return jnp.sum(hits, axis=1, dtype=jnp.float32)


def _mean_of_positions(x: Float[Array, "b T E"]) -> Float[Array, "b E"]:
    return jnp.mean(x, axis=1)


def sequence_balance_loss(
    scores: Float[Array, "b T E"],
    chosen: Float[Array, "b T E"],
    *,
    config: ModelConfig,
    mean: Callable[[Array], Array] = _mean_of_positions,
) -> Float[Array, "b"]:
    """Returns sum_i f_i P_i for each sequence, 1 where the load is even.

    f_i = E / (K T) * number of tokens that chose expert i; P_i = mean over tokens of the score's
    share, s_i / sum_j s_j (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20). Gradients flow
    through P only. `mean` averages [b, T, E] over all positions of a sequence.
    """
    frequency = mean(chosen) * config.num_routed_experts / config.experts_per_token
    share = mean(scores / jnp.sum(scores, axis=-1, keepdims=True))
    return jnp.sum(jax.lax.stop_gradient(frequency) * share, axis=-1)
