"""Blockwise attention in plain XLA.

Sequences are cut into blocks; a block of queries meets the blocks of keys up to its own, keeping a
running maximum and sum (arXiv 2112.05682), and the backward pass recomputes the probabilities from
the logarithm of that sum (arXiv 2205.14135). No array is [T, T].

The shape of the program is made for XLA on CPUs, by measurement:

* One product is too small for two cores to share, a batched product runs its members one after the
  other, and independent loops do not overlap; but independent products of one loop body do. So
  several heads are written out in each body.
* Contracting the first dimension of a large left operand halves the speed. So logits are [queries,
  keys] forward, [keys, queries] backward, and the queries' gradient is summed transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.mla_attention.xla_backward import backward
from kimi_jax.kernels.mla_attention.xla_cells import Inputs, block_size
from kimi_jax.kernels.mla_attention.xla_forward import forward


def mla_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B T N H"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T N U"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Computes what the package's `mla_attention` describes."""
    num_positions = value.shape[1]
    inputs = Inputs(q_nope, q_rope, k_nope, k_rope, value, segments)
    padding = -num_positions % block_size(num_positions)
    # Padded positions come last, so that no query sees them, and see only each other.
    inputs = Inputs(*(_pad(x, padding, 0) for x in inputs[:5]), _pad(segments, padding, -1))
    out, largest = _attend(inputs, scale)
    return out[:, :num_positions], jnp.max(largest[:, :num_positions, :, 0], axis=1)


def _pad(x: Array, amount: int, fill: int) -> Array:
    if amount == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs: Inputs, scale: float) -> tuple[Array, Array]:
    out, largest, _ = forward(inputs, scale)
    return out, largest


def _attend_forward(inputs: Inputs, scale: float):
    out, largest, log_sum = forward(inputs, scale)
    return (out, largest), (inputs, out, log_sum[..., 0].transpose(0, 2, 1))


def _attend_backward(scale: float, residuals, cotangents):
    inputs, out, log_sum = residuals
    return (backward(inputs, out, log_sum, cotangents[0], scale),)


_attend.defvjp(_attend_forward, _attend_backward)
