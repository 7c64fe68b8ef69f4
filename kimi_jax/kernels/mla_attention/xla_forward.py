"""The forward pass of blockwise attention in plain XLA."""

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
    rows,
    store,
    strips,
)
from kimi_jax.kernels.products import dot


class _Softmax(NamedTuple):
    """A softmax over the keys met so far, for the queries of one block and head."""

    largest: Array  # [t, 1]
    total: Array  # [t, 1], the sum of exp(logit - largest)
    weighted: Array  # [t, U], the same sum times values


def forward(inputs: Inputs, scale: float) -> tuple[Array, Array, Array]:
    """Returns the output, and each softmax's largest logit and log of its sum, [B, T, N, 1]."""
    batch, num_positions, num_heads, _ = inputs.value.shape

    def visit(cell, at, results):
        parts = _cell_forward(cell, scale)
        return tuple(store(r, part, at) for r, part in zip(results, parts, strict=True))

    # Loops write float32: updating a bfloat16 array in place converts all of it, twice, each time.
    column = jnp.zeros((batch, num_positions, num_heads, 1), F32)
    start = (jnp.zeros(inputs.value.shape, F32), column, column)
    out, largest, log_sum = for_each_cell(inputs, visit, start, keys_first=False)
    return out.astype(inputs.value.dtype), largest, log_sum


def _cell_forward(cell: Cell, scale: float) -> tuple[Array, Array, Array]:
    """Returns the output [n, T, U], largest logits [n, T, 1] and logarithms of sums [n, T, 1]."""
    together, num_positions, _ = cell.value.shape
    block = block_size(num_positions)
    if num_positions == block:
        return _query_block_forward(cell, 0, block, scale)

    def attend_block(i, results):
        parts = _query_block_forward(cell, i * block, block, scale)
        return tuple(
            jax.lax.dynamic_update_slice(r, part, (0, i * block, 0))
            for r, part in zip(results, parts, strict=True)
        )

    column = jnp.zeros((together, num_positions, 1), F32)
    start = (jnp.zeros(cell.value.shape, F32), column, column)
    return jax.lax.fori_loop(0, num_positions // block, attend_block, start)


def _query_block_forward(cell: Cell, start: Array | int, block: int, scale: float):
    together, num_positions, _ = cell.value.shape
    queries = rows(cell, start, block)
    states = _diagonal_forward(queries, scale)

    def attend_keys(j, states):
        keys = rows(cell, j * block, block)
        visible = queries.segments[:, None] == keys.segments[None, :]
        return [
            _merge(states[n], _softmax(queries.q[n], keys.k[n], keys.value[n], visible, scale))
            for n in range(together)
        ]

    if num_positions > block:
        states = jax.lax.fori_loop(0, start // block, attend_keys, states)
    out = jnp.stack([state.weighted / state.total for state in states])
    largest = jnp.stack([state.largest for state in states])
    return out, largest, largest + jnp.log(jnp.stack([state.total for state in states]))


def _diagonal_forward(cell: Cell, scale: float) -> list[_Softmax]:
    """Meets a block with itself, in strips of some queries and the keys up to the last of them."""
    states = []
    for n in range(cell.value.shape[0]):
        parts = [
            _softmax(
                cell.q[n, first:last],
                cell.k[n, :last],
                cell.value[n, :last],
                cell.visible[first:last, :last],
                scale,
            )
            for first, last in strips(cell.value.shape[1])
        ]
        states.append(_Softmax(*(jnp.concatenate(column) for column in zip(*parts, strict=True))))
    return states


def _softmax(q: Array, k: Array, value: Array, visible: Array, scale: float) -> _Softmax:
    logits = jnp.where(visible, scale * dot(q, k, 1, 1), MASKED)
    largest = jnp.max(logits, axis=1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    return _Softmax(
        largest=largest,
        total=jnp.sum(exponentials, axis=1, keepdims=True),
        weighted=dot(exponentials.astype(value.dtype), value, 1, 0),
    )


def _merge(a: _Softmax, b: _Softmax) -> _Softmax:
    largest = jnp.maximum(a.largest, b.largest)
    scale_a, scale_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    return _Softmax(
        largest=largest,
        total=scale_a * a.total + scale_b * b.total,
        weighted=scale_a * a.weighted + scale_b * b.weighted,
    )
