"""Brings tokens to the devices that own their experts, and the results back.

Three ways behind one signature. GATHER lets every device see all tokens of the expert axis. RAGGED
and PADDED send each assignment, a token and one of its experts, to that expert's device alone:

    y = collect(back(local_experts(send(spread(x)))))

`spread` copies tokens into assignments sorted by expert; `send` moves these to the experts'
devices; `collect` and `back` are the transposes of the two. So the backward pass is the same
exchange in the other direction.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ComputeConfig, Exchange
from kimi_jax.core.platform import target_platform
from kimi_jax.core.sorted_rows import collect, spread
from kimi_jax.parallel import padded_exchange, ragged_exchange
from kimi_jax.parallel.assignments import sort_assignments
from kimi_jax.parallel.mesh import EXPERT

# (rows [W, D], local expert ids [W, K], weights [W, K]) -> weighted sums [W, D]; ids outside the
# device's own experts contribute nothing.
LocalExperts = Callable[[Array, Array, Array], Array]


def exchange_per_shard(
    local_experts: LocalExperts,
    x: Float[Array, "W D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    *,
    num_local_experts: int,
    choices: ComputeConfig,
) -> tuple[Float[Array, "W D"], Float[Array, ""]]:
    """Computes y[t] = sum_k weights[t, k] E_{ids[t, k]}(x[t]), the experts split over devices.

    GATHER all-gathers tokens, ids and weights over the expert axis, and reduce-scatters the sums.
    RAGGED and PADDED exchange the W K assignments all-to-all, there and back. Their buffers have a
    fixed size: with `exchange_capacity` c, room for c times what an even load brings (RAGGED counts
    by receiver, PADDED by sender and receiver). What finds no room is dropped, and counted. With
    None there is room for the worst case, and nothing is dropped.

    Args:
      local_experts: the computation on the device's own experts, with ids counted from 0.
      x: this device's tokens.
      expert_ids: chosen experts, global numbers.
      weights: their weights.
      num_local_experts: experts on each device; device i of the axis owns those from i *
        num_local_experts.
      choices: `exchange` and `exchange_capacity` act here.

    Returns:
      This device's tokens' sums, and how many of its assignments were dropped, float32.
    """
    nothing_dropped = jnp.zeros((), jnp.float32)
    if jax.lax.axis_size(EXPERT) == 1:
        return local_experts(x, expert_ids, weights), nothing_dropped
    match _resolve(choices.exchange):
        case Exchange.GATHER:
            sums = _gather_tokens(local_experts, x, expert_ids, weights, num_local_experts)
            return sums, nothing_dropped
        case Exchange.RAGGED:
            backend = ragged_exchange
        case Exchange.PADDED:
            backend = padded_exchange
    per_token = expert_ids.shape[1]
    order = sort_assignments(expert_ids, num_local_experts)
    plan, dropped = backend.make_plan(
        order, per_token=per_token, held=num_local_experts, capacity=choices.exchange_capacity
    )
    local_ids = expert_ids.reshape(-1)[order.rows.source] % num_local_experts
    # An empty place holds 0, which stands for no expert.
    ids = backend.send_numbers(plan, local_ids + 1) - 1
    rows = backend.send(plan, spread(per_token, order.rows, x))
    shares = backend.send(plan, spread(1, order.rows, weights.reshape(-1, 1)))
    sums = local_experts(rows, ids[:, None], shares)
    return collect(per_token, order.rows, backend.back(plan, sums)), dropped


def _resolve(exchange: Exchange) -> Exchange:
    """AUTO is GATHER on a CPU, whose few devices share one memory, and RAGGED elsewhere."""
    if exchange is not Exchange.AUTO:
        return exchange
    return Exchange.GATHER if target_platform() == "cpu" else Exchange.RAGGED


def _gather_tokens(
    local_experts: LocalExperts, x: Array, expert_ids: Array, weights: Array, num_local_experts: int
) -> Array:
    first = jax.lax.axis_index(EXPERT) * num_local_experts
    everyone = [jax.lax.all_gather(part, EXPERT, tiled=True) for part in (x, expert_ids, weights)]
    sums = local_experts(everyone[0], everyone[1] - first, everyone[2])
    return jax.lax.psum_scatter(sums, EXPERT, tiled=True)
