"""Blockwise attention in plain XLA, for accelerators: one loop, large products.

Sequences are cut into blocks. The loop's steps are the pairs of a block of queries and a block of
keys that is not later; each step computes all heads of all sequences. So the program is small, the
number of steps is known to the compiler, and no pair above the diagonal is computed. The running
maximum, sum and output (arXiv 2112.05682) lie in arrays over all positions, of which a step reads
and writes one block; the backward pass recomputes the probabilities from the logarithm of the sum
(arXiv 2205.14135). No array is [T, T].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

BLOCK = 512  # positions: at most this many queries and keys meet in a step
MASKED = -1e30  # logit of a masked pair; finite, so that differences of two are numbers

F32 = jnp.float32


class _Operands(NamedTuple):
    """Heads first, so that products are batched over sequences and heads; whole blocks."""

    q: Array  # [B, N, T, H+R]
    k: Array  # [B, N, T, H+R]
    value: Array  # [B, N, T, U]
    segments: Array  # [B, T]


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
    padding = -num_positions % _block_size(num_positions)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    operands = _Operands(
        q=_heads_first(jnp.concatenate([q_nope, q_rope], axis=-1), padding),
        k=_heads_first(jnp.concatenate([k_nope, k_rope], axis=-1), padding),
        value=_heads_first(value, padding),
        # Padded positions come last, so that no query sees them, and see only each other.
        segments=jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1),
    )
    out, largest = _attend(operands, scale)
    max_logit = jnp.max(largest[:, :, :num_positions], axis=2)
    return out[:, :, :num_positions].transpose(0, 2, 1, 3), max_logit


def _block_size(num_positions: int) -> int:
    """Returns the length of the equal blocks that positions are cut into."""
    num_blocks = -(-num_positions // BLOCK)
    return -(-num_positions // num_blocks)


def _heads_first(x: Array, padding: int) -> Array:
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(operands: _Operands, scale: float) -> tuple[Array, Array]:
    out, largest, _ = _forward(operands, scale)
    return out, largest


def _attend_forward(operands: _Operands, scale: float):
    out, largest, log_sum = _forward(operands, scale)
    out = checkpoint_name(out, "attention_out")
    log_sum = checkpoint_name(log_sum, "attention_log_sum")
    return (out, largest), (operands, out, log_sum)


def _attend_backward(scale: float, residuals, cotangents):
    operands, out, log_sum = residuals
    d_out = cotangents[0]
    inner = jnp.sum(out.astype(F32) * d_out.astype(F32), axis=-1)
    return (_backward(operands, d_out, log_sum, inner, scale),)


_attend.defvjp(_attend_forward, _attend_backward)


def _over_pairs(num_positions: int, step: Any, start: Any) -> Any:
    """Calls `state = step(state, first query, first key, block)` for each pair of blocks."""
    block = _block_size(num_positions)
    pairs = [(i, j) for i in range(num_positions // block) for j in range(i + 1)]

    def body(state, pair):
        return step(state, pair[0] * block, pair[1] * block, block), None

    return jax.lax.scan(body, start, np.array(pairs, np.int32))[0]


def _keep_masks_here(operands: _Operands) -> _Operands:
    """Makes segments, in JAX's eyes, depend on the layer.

    They are the same in each, so that JAX would make the masks once, before a scan over layers: for
    every pair and head, which is more to keep and to read than all else in attention.
    """
    return _Operands(*jax.lax.optimization_barrier(tuple(operands)))


def _take(x: Array, start: Array, block: int) -> Array:
    """Takes positions from [B, N, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start, block, axis=2)


def _put(x: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=2)


def _logits(operands: _Operands, query: Array, key: Array, block: int, scale: float) -> Array:
    """Returns the masked logits of two blocks, [B, N, t, s]."""
    q, k = _take(operands.q, query, block), _take(operands.k, key, block)
    own, theirs = (
        jax.lax.dynamic_slice_in_dim(operands.segments, start, block, axis=1)
        for start in (query, key)
    )
    position = jnp.arange(block)
    earlier = query + position[:, None] >= key + position[None, :]
    visible = earlier & (own[:, :, None] == theirs[:, None, :])
    return jnp.where(visible[:, None], scale * _product("bntx,bnsx->bnts", q, k), MASKED)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=F32)


def _forward(operands: _Operands, scale: float) -> tuple[Array, Array, Array]:
    """Returns the output [B, N, T, U], largest logits and log of sums [B, N, T], float32."""
    operands = _keep_masks_here(operands)

    def step(state, query, key, block):
        largest, total, weighted = (_take(x, query, block) for x in state)
        logits = _logits(operands, query, key, block, scale)
        value = _take(operands.value, key, block)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - new_largest[..., None])
        fading = jnp.exp(largest - new_largest)
        part = _product("bnts,bnsu->bntu", exponentials.astype(value.dtype), value)
        new = (
            new_largest,
            fading * total + jnp.sum(exponentials, axis=-1),
            fading[..., None] * weighted + part,
        )
        return tuple(_put(x, block_of_x, query) for x, block_of_x in zip(state, new, strict=True))

    shape = operands.value.shape
    start = (jnp.full(shape[:3], MASKED, F32), jnp.zeros(shape[:3], F32), jnp.zeros(shape, F32))
    largest, total, weighted = _over_pairs(shape[2], step, start)
    out = (weighted / total[..., None]).astype(operands.value.dtype)
    return out, largest, largest + jnp.log(total)


def _backward(
    operands: _Operands, d_out: Array, log_sum: Array, inner: Array, scale: float
) -> _Operands:
    """Returns the gradients, none of the segments; `inner` is out . d_out, [B, N, T]."""
    operands = _keep_masks_here(operands)

    def step(sums, query, key, block):
        q, k = _take(operands.q, query, block), _take(operands.k, key, block)
        value, d_rows = _take(operands.value, key, block), _take(d_out, query, block)
        logits = _logits(operands, query, key, block, scale)
        probabilities = jnp.exp(logits - _take(log_sum, query, block)[..., None])
        d_probabilities = _product("bntu,bnsu->bnts", d_rows, value)
        d_logits = scale * probabilities * (d_probabilities - _take(inner, query, block)[..., None])
        d_logits = d_logits.astype(q.dtype)
        parts = (
            (_product("bnts,bnsx->bntx", d_logits, k), query),
            (_product("bnts,bntx->bnsx", d_logits, q), key),
            (_product("bnts,bntu->bnsu", probabilities.astype(q.dtype), d_rows), key),
        )
        return tuple(
            _put(total, _take(total, start, block) + part, start)
            for total, (part, start) in zip(sums, parts, strict=True)
        )

    start = tuple(jnp.zeros(x.shape, F32) for x in operands[:3])
    sums = _over_pairs(d_out.shape[2], step, start)
    grads = (total.astype(x.dtype) for total, x in zip(sums, operands[:3], strict=True))
    return _Operands(*grads, None)
