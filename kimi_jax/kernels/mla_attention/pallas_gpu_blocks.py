"""What the kernels of attention on Hopper share: operands, grids and masks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.kernels.hopper.program import TILE
from kimi_jax.kernels.hopper.softmax import MASKED, along_columns, along_rows


class Keys(NamedTuple):
    """Arrays, or their part that is in shared memory."""

    nope: Any  # [B, T, N, H]
    rope: Any  # [B, T, R]
    value: Any  # [B, T, N, U]
    segments: Any  # [B, T]

    def at(self, sequence: Array, head: Array, rows: Any) -> "Keys":
        """Returns one head's rows."""
        nope, value = (x.at[sequence, rows, head] for x in (self.nope, self.value))
        return Keys(nope, self.rope.at[sequence, rows], value, self.segments.at[sequence, rows])


class Queries(NamedTuple):
    """Arrays that the backward pass reads by query, or their part that is in shared memory."""

    nope: Any  # [B, T, N, H]
    rope: Any  # [B, T, N, R]
    d_out: Any  # [B, T, N, U]
    segments: Any  # [B, T]
    log_sum: Any  # [B, N, T], to base 2
    inner: Any  # [B, N, T], out . d_out

    def at(self, sequence: Array, head: Array, rows: Any) -> "Queries":
        """Returns one head's rows."""
        wide = (x.at[sequence, rows, head] for x in self[:3])
        columns = (x.at[sequence, head, rows] for x in self[4:])
        return Queries(*wide, self.segments.at[sequence, rows], *columns)


def shared_memory(arrays: Any, *shape: int) -> Any:
    """Describes shared memory for blocks of `Keys` or `Queries`; the shape ends in rows."""
    vectors = ("segments", "log_sum", "inner")
    return type(arrays)(
        *(
            plgpu.SMEM(shape if name in vectors else (*shape, x.shape[-1]), x.dtype)
            for name, x in arrays._asdict().items()
        )
    )


def pick(blocks: Any, index: Array) -> Any:
    """Returns one block of shared memory that `shared_memory` describes."""
    return type(blocks)(*(ref.at[index] for ref in blocks))


def axes() -> tuple[Array, Array, Array]:
    """Returns a thread block's tile, head and sequence."""
    return tuple(jax.lax.axis_index(name) for name in ("tile", "head", "sequence"))


def grid(batch: int, num_heads: int, num_positions: int, tile: int) -> dict[str, int]:
    """Returns the grid: tiles of one head run together, so that the cache holds what they share."""
    return {"tile": num_positions // tile, "head": num_heads, "sequence": batch}


def cost(operands: Any, results: Any, widths: int) -> pl.CostEstimate:
    """Estimates a kernel that does `widths` products for each visible pair; each array once."""
    batch, num_positions, num_heads, _ = operands[0].shape
    pairs = batch * num_heads * num_positions * (num_positions + TILE) // 2
    arrays = jax.tree.leaves((operands, results))
    return pl.CostEstimate(
        flops=2 * pairs * widths,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        transcendentals=pairs,
    )


class Pairs(NamedTuple):
    """Which pairs of a block of logits meet."""

    row_minus_column: Array  # position of the first row, less that of the first column
    rows_are_queries: bool
    crosses_diagonal: bool  # else causality hides no pair

    def mask(self, logits: Array, row_segments: Array, column_segments: Array) -> Array:
        """Returns the logits, `MASKED` where the query does not see the key."""
        shape = logits.shape
        visible = along_rows(row_segments, shape) == along_columns(column_segments, shape)
        if self.crosses_diagonal:
            row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            row += self.row_minus_column
            visible &= (row >= column) if self.rows_are_queries else (row <= column)
        return jnp.where(visible, logits, MASKED)
