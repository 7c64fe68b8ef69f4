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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.products import dot

# Measured with 8 heads of 48 + 32: shorter strips are faster, and 8 heads together are not.
BLOCK = 256  # positions: at most this many queries and keys meet at a time
DIAGONAL_STEP = 64  # positions: a block meets itself in strips, each up to the diagonal only
HEADS_TOGETHER = 4  # heads written out in one loop body
MASKED = -1e30  # logit of a masked pair; finite, so that differences of two are numbers

F32 = jnp.float32


class _Inputs(NamedTuple):
    """The operands, padded to whole blocks."""

    q_nope: Array  # [B, T, N, H]
    q_rope: Array  # [B, T, N, R]
    k_nope: Array  # [B, T, N, H]
    k_rope: Array  # [B, T, R]
    value: Array  # [B, T, N, U]
    segments: Array  # [B, T]


class _Cell(NamedTuple):
    """Some heads of one sequence."""

    q: Array  # [n, T, H+R]
    k: Array  # [n, T, H+R]
    value: Array  # [n, T, U]
    segments: Array  # [T]


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
    inputs = _Inputs(q_nope, q_rope, k_nope, k_rope, value, segments)
    padding = -num_positions % _block_size(num_positions)
    # Padded positions come last, so that no query sees them, and see only each other.
    inputs = _Inputs(*(_pad(x, padding, 0) for x in inputs[:5]), _pad(segments, padding, -1))
    out, largest = _attend(inputs, scale)
    return out[:, :num_positions], jnp.max(largest[:, :num_positions, :, 0], axis=1)


def _block_size(num_positions: int) -> int:
    num_blocks = -(-num_positions // BLOCK)
    return -(-num_positions // num_blocks)


def _pad(x: Array, amount: int, fill: int) -> Array:
    if amount == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, amount)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(inputs: _Inputs, scale: float) -> tuple[Array, Array]:
    out, largest, _ = _forward(inputs, scale)
    return out, largest


def _attend_forward(inputs: _Inputs, scale: float):
    out, largest, log_sum = _forward(inputs, scale)
    return (out, largest), (inputs, out, log_sum)


def _attend_backward(scale: float, residuals, cotangents):
    inputs, out, log_sum = residuals
    return (_backward(inputs, out, log_sum, cotangents[0], scale),)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(inputs: _Inputs, scale: float) -> tuple[Array, Array, Array]:
    """Returns the output, and each softmax's largest logit and log of its sum, [B, T, N, 1]."""
    batch, num_positions, num_heads, _ = inputs.value.shape
    together = _heads_together(num_heads)
    groups = num_heads // together

    def attend_cell(index, results):
        sequence, head = index // groups, index % groups * together
        parts = _cell_forward(_load(inputs, sequence, head, together), scale)
        return tuple(
            _store(r, part, sequence, head) for r, part in zip(results, parts, strict=True)
        )

    # Loops write float32: updating a bfloat16 array in place converts all of it, twice, each time.
    column = jnp.zeros((batch, num_positions, num_heads, 1), F32)
    start = (jnp.zeros(inputs.value.shape, F32), column, column)
    out, largest, log_sum = jax.lax.fori_loop(0, batch * groups, attend_cell, start)
    return out.astype(inputs.value.dtype), largest, log_sum


def _heads_together(num_heads: int) -> int:
    return max(n for n in range(1, HEADS_TOGETHER + 1) if num_heads % n == 0)


def _load(inputs: _Inputs, sequence: Array, head: Array, together: int) -> _Cell:
    q = jnp.concatenate(
        [_heads(x, sequence, head, together) for x in (inputs.q_nope, inputs.q_rope)], axis=-1
    )
    k_nope = _heads(inputs.k_nope, sequence, head, together)
    k_rope = jnp.broadcast_to(inputs.k_rope[sequence], (together, *inputs.k_rope.shape[1:]))
    return _Cell(
        q=q,
        k=jnp.concatenate([k_nope, k_rope], axis=-1),
        value=_heads(inputs.value, sequence, head, together),
        segments=inputs.segments[sequence],
    )


def _heads(x: Array, sequence: Array, head: Array, together: int) -> Array:
    """Takes `together` heads of one sequence: [B, T, N, X] -> [n, T, X]."""
    _, num_positions, _, width = x.shape
    part = jax.lax.dynamic_slice(x, (sequence, 0, head, 0), (1, num_positions, together, width))
    return part[0].transpose(1, 0, 2)


def _store(x: Array, part: Array, sequence: Array, head: Array) -> Array:
    """Puts [n, T, X] where `_heads` took it from."""
    part = part.transpose(1, 0, 2)[None]
    return jax.lax.dynamic_update_slice(x, part, (sequence, 0, head, 0))


class _Softmax(NamedTuple):
    """A softmax over the keys met so far, for the queries of one block and head."""

    largest: Array  # [t, 1]
    total: Array  # [t, 1], the sum of exp(logit - largest)
    weighted: Array  # [t, U], the same sum times values


def _cell_forward(cell: _Cell, scale: float) -> tuple[Array, Array, Array]:
    """Returns the output [n, T, U], largest logits [n, T, 1] and logarithms of sums [n, T, 1]."""
    together, num_positions, _ = cell.value.shape
    block = _block_size(num_positions)
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


def _query_block_forward(cell: _Cell, start: Array | int, block: int, scale: float):
    together, num_positions, _ = cell.value.shape
    rows = _rows(cell, start, block)
    states = _diagonal_forward(rows, scale)

    def attend_keys(j, states):
        keys = _rows(cell, j * block, block)
        visible = rows.segments[:, None] == keys.segments[None, :]
        return [
            _merge(states[n], _softmax(rows.q[n], keys.k[n], keys.value[n], visible, scale))
            for n in range(together)
        ]

    if num_positions > block:
        states = jax.lax.fori_loop(0, start // block, attend_keys, states)
    out = jnp.stack([state.weighted / state.total for state in states])
    largest = jnp.stack([state.largest for state in states])
    return out, largest, largest + jnp.log(jnp.stack([state.total for state in states]))


def _rows(cell: _Cell, start: Array | int, size: int) -> _Cell:
    """Takes positions start : start + size."""
    if size == cell.value.shape[1]:
        return cell
    return _Cell(
        *(jax.lax.dynamic_slice_in_dim(x, start, size, axis=-2) for x in cell[:3]),
        *(jax.lax.dynamic_slice_in_dim(x, start, size) for x in cell[3:]),
    )


def _diagonal_forward(rows: _Cell, scale: float) -> list[_Softmax]:
    """Meets a block with itself, in steps of some queries and the keys up to the last of them."""
    states = []
    for n in range(rows.value.shape[0]):
        parts = [
            _softmax(
                rows.q[n, first:last],
                rows.k[n, :last],
                rows.value[n, :last],
                _visible(rows, slice(first, last), slice(0, last)),
                scale,
            )
            for first, last in _diagonal_parts(rows.value.shape[1])
        ]
        states.append(_Softmax(*(jnp.concatenate(column) for column in zip(*parts, strict=True))))
    return states


def _diagonal_parts(block: int) -> list[tuple[int, int]]:
    """Cuts a block's positions into ranges of `DIAGONAL_STEP`, the last shorter."""
    return [(at, min(at + DIAGONAL_STEP, block)) for at in range(0, block, DIAGONAL_STEP)]


def _visible(rows: _Cell, queries: slice, keys: slice) -> Array:
    """Mask [t, s] of two ranges of one block: not in the future, and in the same document."""
    position = jnp.arange(rows.segments.shape[0])
    return (position[queries, None] >= position[None, keys]) & (
        rows.segments[queries, None] == rows.segments[None, keys]
    )


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


class _Outward(NamedTuple):
    """What the backward pass knows about the queries of a cell."""

    d_out: Array  # [n, T, U]
    log_sum: Array  # [n, T, 1], softmax = exp(logit - log_sum)
    inner: Array  # [n, T, 1], out . d_out, the mean gradient under the softmax


def _backward(inputs: _Inputs, out: Array, log_sum: Array, d_out: Array, scale: float) -> _Inputs:
    batch, _, num_heads, width = inputs.q_nope.shape
    together = _heads_together(num_heads)
    groups = num_heads // together
    inner = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1, keepdims=True)

    def backward_cell(index, grads):
        sequence, head = index // groups, index % groups * together
        outward = _Outward(*(_heads(x, sequence, head, together) for x in (d_out, log_sum, inner)))
        cell = _load(inputs, sequence, head, together)
        d_q, d_k, d_value = _cell_backward(cell, outward, scale)
        d_q_nope, d_q_rope, d_k_nope, d_k_rope, d_v = grads
        d_k_shared = d_k_rope[sequence] + jnp.sum(d_k[..., width:], axis=0)
        return (
            _store(d_q_nope, d_q[..., :width], sequence, head),
            _store(d_q_rope, d_q[..., width:], sequence, head),
            _store(d_k_nope, d_k[..., :width], sequence, head),
            jax.lax.dynamic_update_index_in_dim(d_k_rope, d_k_shared, sequence, axis=0),
            _store(d_v, d_value, sequence, head),
        )

    operands = inputs[:5]
    start = tuple(jnp.zeros(x.shape, F32) for x in operands)
    sums = jax.lax.fori_loop(0, batch * groups, backward_cell, start)
    grads = (d_x.astype(x.dtype) for d_x, x in zip(sums, operands, strict=True))
    return _Inputs(*grads, None)


def _cell_backward(cell: _Cell, outward: _Outward, scale: float) -> tuple[Array, Array, Array]:
    """Returns the gradients of q [n, T, H+R], k [n, T, H+R] and value [n, T, U]."""
    together, num_positions, _ = cell.value.shape
    block = _block_size(num_positions)
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


def _key_block_backward(cell: _Cell, outward: _Outward, j, d_q_transposed: Array, scale: float):
    """Meets the j-th block of keys with the queries that see it."""
    together, num_positions, _ = cell.value.shape
    block = _block_size(num_positions)
    keys = _rows(cell, j * block, block)

    def add_queries(d_q_transposed, i, part):
        old = jax.lax.dynamic_slice_in_dim(d_q_transposed, i * block, block, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(d_q_transposed, old + part, i * block, axis=2)

    def meet(i, grads):
        d_q_transposed, d_k, d_value = grads
        rows, at = _rows(cell, i * block, block), _outward_rows(outward, i * block, block)
        visible = keys.segments[:, None] == rows.segments[None, :]
        parts = [
            _pair_backward(
                rows.q[n], keys.k[n], keys.value[n], _Outward(*(x[n] for x in at)), visible, scale
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


def _diagonal_backward(rows: _Cell, outward: _Outward, scale: float) -> tuple[Array, Array, Array]:
    """Meets a block with itself, in steps of some keys and the queries from the first of them.

    Returns:
      The gradients of q, transposed [n, H+R, t], of k [n, t, H+R] and of value [n, t, U].
    """
    together, block, _ = rows.value.shape
    heads = []
    for n in range(together):
        d_q_transposed, d_ks, d_values = 0.0, [], []
        for first, last in _diagonal_parts(block):
            queries, keys = slice(first, block), slice(first, last)
            part, d_k, d_value = _pair_backward(
                rows.q[n, queries],
                rows.k[n, keys],
                rows.value[n, keys],
                _Outward(*(x[n, queries] for x in outward)),
                _visible(rows, queries, keys).T,
                scale,
            )
            d_q_transposed = d_q_transposed + jnp.pad(part, ((0, 0), (first, 0)))
            d_ks.append(d_k)
            d_values.append(d_value)
        heads.append((d_q_transposed, jnp.concatenate(d_ks), jnp.concatenate(d_values)))
    return tuple(jnp.stack(parts) for parts in zip(*heads, strict=True))


def _pair_backward(
    q: Array, k: Array, value: Array, outward: _Outward, visible: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of one head's q [t, H+R] (transposed), k [s, H+R] and value [s, U]; mask [s, t]."""
    log_sum, inner = outward.log_sum.reshape(1, -1), outward.inner.reshape(1, -1)
    logits = scale * dot(k, q, 1, 1)
    probabilities = jnp.where(visible, jnp.exp(logits - log_sum), 0.0)
    d_probabilities = dot(value, outward.d_out, 1, 1)
    d_logits = (scale * probabilities * (d_probabilities - inner)).astype(q.dtype)
    d_value = dot(probabilities.astype(q.dtype), outward.d_out, 1, 0)
    return dot(k, d_logits, 0, 0), dot(d_logits, q, 1, 0), d_value
