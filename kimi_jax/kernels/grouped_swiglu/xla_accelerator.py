"""Assignments sorted by expert, and three ragged products over all of them, in plain XLA.

`jax.lax.ragged_dot` multiplies each expert's rows with its matrix. On TPUs it is a kernel of its
own whose work follows the rows; on CPUs and GPUs every expert multiplies every row.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.core.sorted_rows import collect, sort_rows, spread


def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Float[Array, "E D M"],
    w_up: Float[Array, "E D M"],
    w_down: Float[Array, "E M D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
) -> Float[Array, "W D"]:
    """Computes what the package's `grouped_swiglu` describes."""
    num_experts, per_token = w_gate.shape[0], expert_ids.shape[1]
    held_here = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(held_here, expert_ids, num_experts).reshape(-1)  # foreign ones come last
    order = sort_rows(expert)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    has_expert = (jnp.arange(expert.size) < jnp.sum(sizes))[:, None]

    def multiply(rows: Array, matrices: Array) -> Array:
        # The kernel sums in float32 and rounds once; it leaves rows of no expert undefined.
        return jnp.where(has_expert, jax.lax.ragged_dot(rows, matrices, sizes), 0)

    rows = jnp.where(has_expert, spread(per_token, order, x), 0)
    rows = checkpoint_name(rows, "expert_inputs")
    gate = checkpoint_name(multiply(rows, w_gate), "expert_gate")
    up = checkpoint_name(multiply(rows, w_up), "expert_up")
    share = spread(1, order, weights.reshape(-1, 1).astype(jnp.float32))
    share = jnp.where(has_expert, share, 0.0)
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32) * share
    return collect(per_token, order, multiply(hidden.astype(x.dtype), w_down))
