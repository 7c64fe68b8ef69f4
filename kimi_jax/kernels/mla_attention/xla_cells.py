"""How the plain XLA program walks over sequences, heads and blocks of positions."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Measured with 8 heads of 48 + 32: shorter strips waste less work and need more programs, and more
# heads give the cores more to do at a time; both take longer to compile.
BLOCK = 256  # positions: at most this many queries and keys meet at a time
DIAGONAL_STEP = 128  # positions: a block meets itself in strips, each up to the diagonal only
HEADS_TOGETHER = 4  # heads written out in one loop body
MASKED = -1e30  # logit of a masked pair; finite, so that differences of two are numbers

F32 = jnp.float32


class Inputs(NamedTuple):
    """The operands, padded to whole blocks."""

    q_nope: Array  # [B, T, N, H]
    q_rope: Array  # [B, T, N, R]
    k_nope: Array  # [B, T, N, H]
    k_rope: Array  # [B, T, R]
    value: Array  # [B, T, N, U]
    segments: Array  # [B, T]


class Cell(NamedTuple):
    """Some heads of one sequence, or of a range of its positions."""

    q: Array  # [n, T, H+R]
    k: Array  # [n, T, H+R]
    value: Array  # [n, T, U]
    visible: Array  # [T, block], the mask of each position and those of its own block
    segments: Array  # [T]


def block_size(num_positions: int) -> int:
    """Returns the length of the equal blocks that positions are cut into."""
    num_blocks = -(-num_positions // BLOCK)
    return -(-num_positions // num_blocks)


def for_each_cell(
    inputs: Inputs,
    visit: Callable[[Cell, tuple[Array, Array], Any], Any],
    results: Any,
    *,
    keys_first: bool,
) -> Any:
    """Calls `results = visit(cell, (sequence, first head), results)` for every cell, in loops.

    Sequences are the outer loop, so that a mask is made once for all heads.
    """
    batch, _, num_heads, _ = inputs.value.shape
    together = max(n for n in range(1, HEADS_TOGETHER + 1) if num_heads % n == 0)

    def visit_sequence(sequence, results):
        visible = _own_block_mask(inputs.segments[sequence], keys_first)

        def visit_heads(group, results):
            at = (sequence, group * together)
            return visit(_load(inputs, visible, at, together), at, results)

        return jax.lax.fori_loop(0, num_heads // together, visit_heads, results)

    return jax.lax.fori_loop(0, batch, visit_sequence, results)


def _own_block_mask(segments: Array, keys_first: bool) -> Array:
    """Masks queries and keys of one block: not in the future, and in the same document.

    Returns:
      [T, block]: rows are queries and columns keys, or the other way round with `keys_first`.
    """
    block = block_size(segments.size)
    position = jnp.arange(block)
    earlier = position[:, None] <= position if keys_first else position[:, None] >= position
    documents = segments.reshape(-1, block)
    same = documents[:, :, None] == documents[:, None, :]
    return (earlier & same).reshape(-1, block)


def _load(inputs: Inputs, visible: Array, at: tuple[Array, Array], together: int) -> Cell:
    sequence = at[0]
    q = jnp.concatenate([heads(x, at, together) for x in (inputs.q_nope, inputs.q_rope)], axis=-1)
    k_nope = heads(inputs.k_nope, at, together)
    k_rope = jnp.broadcast_to(inputs.k_rope[sequence], (together, *inputs.k_rope.shape[1:]))
    return Cell(
        q=q,
        k=jnp.concatenate([k_nope, k_rope], axis=-1),
        value=heads(inputs.value, at, together),
        visible=visible,
        segments=inputs.segments[sequence],
    )


def heads(x: Array, at: tuple[Array, Array], together: int) -> Array:
    """Takes `together` heads of one sequence: [B, T, N, X] -> [n, T, X]."""
    _, num_positions, _, width = x.shape
    sequence, head = at
    part = jax.lax.dynamic_slice(x, (sequence, 0, head, 0), (1, num_positions, together, width))
    return part[0].transpose(1, 0, 2)


def store(x: Array, part: Array, at: tuple[Array, Array]) -> Array:
    """Puts [n, T, X] where `heads` took it from."""
    sequence, head = at
    return jax.lax.dynamic_update_slice(x, part.transpose(1, 0, 2)[None], (sequence, 0, head, 0))


def rows(cell: Cell, start: Array | int, size: int) -> Cell:
    """Takes positions start : start + size."""
    if size == cell.value.shape[1]:
        return cell
    return Cell(
        *(jax.lax.dynamic_slice_in_dim(x, start, size, axis=-2) for x in cell[:4]),
        jax.lax.dynamic_slice_in_dim(cell.segments, start, size),
    )


def strips(block: int) -> Iterator[tuple[int, int]]:
    """Cuts a block's positions into ranges of `DIAGONAL_STEP`, the last shorter."""
    for first in range(0, block, DIAGONAL_STEP):
        yield first, min(first + DIAGONAL_STEP, block)
