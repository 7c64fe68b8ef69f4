"""Brings tokens to the devices that own their experts, and the results back."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

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
) -> Float[Array, "W D"]:
    """Computes y[t] = sum_k weights[t, k] E_{ids[t, k]}(x[t]), the experts split over devices.

    All-gathers tokens, ids and weights over the expert axis; each device computes what its own
    experts add; the sums return by reduce-scatter. No token is dropped, whatever the load.
    Backward: the same two, swapped.

    Args:
      local_experts: the computation on the device's own experts, with ids counted from 0.
      x: this device's tokens.
      expert_ids: chosen experts, global numbers.
      weights: their weights.
      num_local_experts: experts on each device; device i of the axis owns those from i *
        num_local_experts.

    Returns:
      This device's tokens' sums.
    """
    if jax.lax.axis_size(EXPERT) == 1:
        return local_experts(x, expert_ids, weights)
    first = jax.lax.axis_index(EXPERT) * num_local_experts
    everyone = [jax.lax.all_gather(part, EXPERT, tiled=True) for part in (x, expert_ids, weights)]
    sums = local_experts(everyone[0], everyone[1] - first, everyone[2])
    return jax.lax.psum_scatter(sums, EXPERT, tiled=True)
