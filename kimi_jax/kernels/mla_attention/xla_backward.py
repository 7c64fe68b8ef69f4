"""The backward pass of blockwise attention in plain XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.mla_attention.xla_cells import (
    F32,
    MASKED,
    Cell,
    Inputs,
    block_size,
    for_each_cell,
    heads,
    rows,
    store,
    strips,
)
from kimi_jax.kernels.products import dot


class _Outward(NamedTuple):
    """What the backward pass knows about the queries of a cell."""

    d_out: Array  # [n, T, U]
    log_sum: Array  # [n, T], softmax = exp(logit - log_sum)
    inner: Array  # [n, T], out . d_out, the mean gradient under the softmax


def backward(inputs: Inputs, out: Array, log_sum: Array, d_out: Array, scale: float) -> Inputs:
    """Returns the gradients of the operands, none of the segments.

    Args:
      inputs: operands of the forward pass.
      out: its output.
      log_sum: logarithm of each softmax's sum, [B, N, T].
      d_out: gradient of the output.
      scale: multiplier of the logits.
    """
    width = inputs.q_nope.shape[-1]
    inner = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1).transpose(0, 2, 1)

    def visit(cell, at, grads):
        sequence, head = at
        together = cell.value.shape[0]
        outward = _Outward(
            heads(d_out, at, together),
            *(jax.lax.dynamic_slice_in_dim(x[sequence], head, together) for x in (log_sum, inner)),
        )
        d_q, d_k, d_value = _cell_backward(cell, outward, scale)
        d_q_nope, d_q_rope, d_k_nope, d_k_rope, d_v = grads
        d_k_shared = d_k_rope[sequence] + jnp.sum(d_k[..., width:], axis=0)
        return (
            store(d_q_nope, d_q[..., :width], at),
            store(d_q_rope, d_q[..., width:], at),
            store(d_k_nope, d_k[..., :width], at),
            jax.lax.dynamic_update_index_in_dim(d_k_rope, d_k_shared, sequence, axis=0),
            store(d_v, d_value, at),
        )

    operands = inputs[:5]
    start = tuple(jnp.zeros(x.shape, F32) for x in operands)
    sums = for_each_cell(inputs, visit, start, keys_first=True)
    grads = (d_x.astype(x.dtype) for d_x, x in zip(sums, operands, strict=True))
    return Inputs(*grads, None)


def _cell_backward(cell: Cell, outward: _Outward, scale: float) -> tuple[Array, Array, Array]:
    """Returns the gradients of q [n, T, H+R], k [n, T, H+R] and value [n, T, U]."""
    together, num_positions, _ = cell.value.shape
    block = block_size(num_positions)
    if num_positions == block:
        d_q_transposed, d_k, d_value = _diagonal_backward(cell, outward, scale)
        return d_q_transposed.transpose(0, 2, 1), d_k, d_value

    def backward_block(j, grads):
        d_q_transposed, d_k, d_value = grads
        d_q_transposed, d_k_block, d_value_block = _key_block_backward(
            cell, outward, j, d_q_transposed, scale
        )
        return (
            d_q_transposed,
            jax.lax.dynamic_update_slice_in_dim(d_k, d_k_block, j * block, axis=1),
            jax.lax.dynamic_update_slice_in_dim(d_value, d_value_block, j * block, axis=1),
        )

    start = (
        jnp.zeros((together, cell.q.shape[2], num_positions), F32),
        jnp.zeros(cell.k.shape, F32),
        jnp.zeros(cell.value.shape, F32),
    )
    d_q_transposed, d_k, d_value = jax.lax.fori_loop(
        0, num_positions // block, backward_block, start
    )
    return d_q_transposed.transpose(0, 2, 1), d_k, d_value


def _key_block_backward(cell: Cell, outward: _Outward, j, d_q_transposed: Array, scale: float):
    """Meets the j-th block of keys with the queries that see it."""
    together, num_positions, _ = cell.value.shape
    block = block_size(num_positions)
    keys = rows(cell, j * block, block)
    k_transposed = keys.k.transpose(0, 2, 1)

    def add_queries(d_q_transposed, i, part):
        old = jax.lax.dynamic_slice_in_dim(d_q_transposed, i * block, block, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(d_q_transposed, old + part, i * block, axis=2)

    def meet(i, grads):
        d_q_transposed, d_k, d_value = grads
        queries, at = rows(cell, i * block, block), _outward_rows(outward, i * block, block)
        visible = keys.segments[:, None] == queries.segments[None, :]
        parts = [
            _pair_backward(
                queries.q[n],
                keys.k[n],
                k_transposed[n],
                keys.value[n],
                _Outward(*(x[n] for x in at)),
                visible,
                scale,
            )
            for n in range(together)
        ]
        part, d_k_part, d_value_part = (jnp.stack(x) for x in zip(*parts, strict=True))
        return add_queries(d_q_transposed, i, part), d_k + d_k_part, d_value + d_value_part

    at = _outward_rows(outward, j * block, block)
    part, d_k, d_value = _diagonal_backward(keys, at, scale)
    start = (add_queries(d_q_transposed, j, part), d_k, d_value)
    return jax.lax.fori_loop(j + 1, num_positions // block, meet, start)


def _outward_rows(outward: _Outward, start: Array | int, size: int) -> _Outward:
    return _Outward(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in outward))


def _diagonal_backward(cell: Cell, outward: _Outward, scale: float) -> tuple[Array, Array, Array]:
    """Meets a block with itself, in strips of some keys and the queries from the first of them.

    Returns:
      The gradients of q, transposed [n, H+R, t], of k [n, t, H+R] and of value [n, t, U].
    """
    together, block, _ = cell.value.shape
    k_transposed = cell.k.transpose(0, 2, 1)
    per_head = []
    for n in range(together):
        d_q_transposed, d_ks, d_values = 0.0, [], []
        for first, last in strips(block):
            queries, keys = slice(first, block), slice(first, last)
            part, d_k, d_value = _pair_backward(
                cell.q[n, queries],
                cell.k[n, keys],
                k_transposed[n, :, keys],
                cell.value[n, keys],
                _Outward(*(x[n, queries] for x in outward)),
                cell.visible[keys, queries],
                scale,
            )
            d_q_transposed = d_q_transposed + jnp.pad(part, ((0, 0), (first, 0)))
            d_ks.append(d_k)
            d_values.append(d_value)
        per_head.append((d_q_transposed, jnp.concatenate(d_ks), jnp.concatenate(d_values)))
    return tuple(jnp.stack(parts) for parts in zip(*per_head, strict=True))


def _pair_backward(
    q: Array,
    k: Array,
    k_transposed: Array,
    value: Array,
    outward: _Outward,
    visible: Array,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of one head's q [t, H+R] (transposed), k [s, H+R] and value [s, U]; mask [s, t]."""
    log_sum, inner = outward.log_sum[None, :], outward.inner[None, :]
    logits = jnp.where(visible, scale * dot(k, q, 1, 1), MASKED)
    probabilities = jnp.exp(logits - log_sum)
    d_probabilities = dot(value, outward.d_out, 1, 1)
    d_logits = (scale * probabilities * (d_probabilities - inner)).astype(q.dtype)
    d_value = dot(probabilities.astype(q.dtype), outward.d_out, 1, 0)
    return dot(k_transposed, d_logits, 1, 0), dot(d_logits, q, 1, 0), d_value
