"""Products of rows with matrices on Hopper GPUs, as programs that stay on their multiprocessor.

Each program of a grid of `NUM_BLOCKS` takes result tiles ("units") in turn. One of its warpgroups
copies blocks of the factors to a ring in shared memory, without a pause from unit to unit; two
others multiply, each 64 of a tile's 128 rows, with sums in float32 in registers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from kimi_jax.kernels import hopper

NUM_BLOCKS = 132  # multiprocessors of an H100 or H200 SXM
TILE_ROWS = hopper.COMPUTE * hopper.ROWS
ALIGNMENT = 8  # rows; copies of swizzled blocks start at multiples of it


class Tiles(NamedTuple):
    """Tiles of rows that start at multiples of 8; each is about the rows of one group in it."""

    count: Array  # [1], number of tiles
    group: Array  # [tiles]
    start: Array  # [tiles], row of the array at which the tile starts
    first: Array  # [tiles], first of the tile's rows that belongs to the group
    size: Array  # [tiles], how many of them do


def cut(group_sizes: Int[Array, "E"], num_rows: int) -> Tiles:
    """Cuts each group into tiles; its first starts up to 7 rows before the group.

    Args:
      group_sizes: rows of each group, in order.
      num_rows: their sum, or more.
    """
    num_groups = group_sizes.shape[0]
    end = jnp.cumsum(group_sizes)
    begin = end - group_sizes
    aligned = begin - begin % ALIGNMENT
    tiles_of_group = jnp.where(group_sizes > 0, -((aligned - end) // TILE_ROWS), 0)
    last_tile = jnp.cumsum(tiles_of_group)
    most = (num_rows + num_groups * (TILE_ROWS + ALIGNMENT)) // TILE_ROWS
    index = jnp.arange(most, dtype=group_sizes.dtype)
    group = jnp.sum(index[:, None] >= last_tile[None, :], axis=1, dtype=group_sizes.dtype)
    group = jnp.minimum(group, num_groups - 1)
    start = aligned[group] + (index - (last_tile - tiles_of_group)[group]) * TILE_ROWS
    first = jnp.maximum(begin[group] - start, 0)
    size = jnp.minimum(end[group] - start, TILE_ROWS) - first
    return Tiles(count=last_tile[-1:], group=group, start=start, first=first, size=size)


def with_spare_rows(group_sizes: Int[Array, "E"], num_rows: int) -> Int[Array, "groups"]:
    """Appends the rows of no group as one more group."""
    return jnp.append(group_sizes, num_rows - jnp.sum(group_sizes)).astype(jnp.int32)


class At(NamedTuple):
    """Which block is copied or multiplied."""

    unit: Any
    step: Array  # of the unit
    done: Array  # blocks before it in this program
    slot: Array  # of the ring
    part: int = 0  # step modulo `unrolled`


class Product(NamedTuple):
    """What a kernel does for a unit. A unit has `steps`, a number of blocks to multiply."""

    unit: Callable[[Array], Any]  # (number) -> unit
    copies: Callable[[At, Any], None]  # (block, barrier): starts its copies
    multiply: Callable[[At, Any, Any], None]  # (block, sums, state): adds the block's product
    finish: Callable[[Any, Array], None]  # (unit, sums)
    shape: tuple[int, int]  # of one warpgroup's sums
    begin: Callable[[At], Any] | None = None  # state of a block and the `unrolled - 1` after it
    unrolled: int = 1


def run(num_units: Array, ring: hopper.Ring, product: Callable[[Array], Product]) -> None:
    """Computes all units of this program; `product(warpgroup)` describes what each warpgroup does.

    Args:
      num_units: of all programs together.
      ring: blocks of the factors.
      product: of the warpgroup's number, 0 or 1 for those that multiply.
    """
    block, num_blocks = jax.lax.axis_index("block"), jax.lax.axis_size("block")
    own_units = jax.lax.div(num_units - block + num_blocks - 1, num_blocks)

    def number(i: Array) -> Array:
        return block + i * num_blocks

    def copy() -> None:
        parts = product(jnp.int32(0))

        def fill(i: Array, done: Array) -> Array:
            unit = parts.unit(number(i))
            return jax.lax.fori_loop(
                0, unit.steps, lambda step, done: _fill(parts, ring, unit, step, done), done
            )

        jax.lax.fori_loop(0, own_units, fill, jnp.int32(0))

    def compute(warpgroup: Array) -> None:
        parts = product(warpgroup)
        jax.lax.fori_loop(
            0,
            own_units,
            lambda i, done: _compute(parts, ring, parts.unit(number(i)), done),
            jnp.int32(0),
        )
        plgpu.wait_smem_to_gmem(0)

    hopper.specialise(compute, copy)


def _fill(parts: Product, ring: hopper.Ring, unit: Any, step: Array, done: Array) -> Array:
    """Fills the next slot once it is free; returns the number of blocks copied so far."""
    slot = jax.lax.rem(done, ring.full.shape[0])

    @pl.when(done >= ring.full.shape[0])
    def _():
        plgpu.barrier_wait(ring.empty.at[slot])

    parts.copies(At(unit, step, done, slot), ring.full.at[slot])
    return done + 1


def _compute(parts: Product, ring: hopper.Ring, unit: Any, done: Array) -> Array:
    """Sums a unit's products; a slot is given back when its product, one step later, is done."""
    slots = ring.full.shape[0]

    def multiply(total: Any) -> Array:
        def steps(i: Array, done: Array) -> Array:
            state = None
            for part in range(parts.unrolled):
                at = At(unit, i * parts.unrolled + part, done, jax.lax.rem(done, slots), part)
                if part == 0 and parts.begin is not None:
                    state = parts.begin(at)
                plgpu.barrier_wait(ring.full.at[at.slot])
                parts.multiply(at, total, state)
                plgpu.wgmma_wait(1)

                @pl.when(at.step > 0)
                def _(done=done):
                    plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(done - 1, slots)])

                done = done + 1
            return done

        jax.lax.fori_loop(0, jax.lax.div(unit.steps, parts.unrolled), steps, done)
        return total[...]

    total = pl.run_scoped(multiply, plgpu.ACC(parts.shape))
    done = done + unit.steps

    @pl.when(unit.steps > 0)
    def _():
        plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(done - 1, slots)])

    parts.finish(unit, total)
    return done


def keep_rows(block: Any, first: Array, end: Array) -> None:
    """Clears the rows of a block in shared memory before `first` and from `end` on."""
    num_rows, width = block.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, hopper.ROWS), 0)
    row = plgpu.layout_cast(row, plgpu.Layout.WGMMA)
    for left in range(0, width, hopper.ROWS):
        part = block.at[:, left : left + hopper.ROWS]
        part[...] = jnp.where((row >= first) & (row < end), part[...], 0)


class Rows(NamedTuple):
    """Rows `first` to `first + size - 1` of a block whose row 0 is row `start` of an array."""

    start: Array
    first: Array
    size: Array


def rows_of_half(start: Array, first: Array, size: Array, half: Array) -> Rows:
    """Returns the rows of a tile that lie in its first or second 64."""
    above = half * hopper.ROWS
    begin = jnp.clip(first - above, 0, hopper.ROWS)
    end = jnp.clip(first + size - above, 0, hopper.ROWS)
    return Rows(start=start + above, first=begin, size=end - begin)


def store(total: Array, y_smem: Any, y: Any, rows: Rows, column: Array) -> None:
    """Writes the rows of a tile's sums, by way of shared memory."""
    width = y_smem.shape[1]
    for left in range(0, total.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_smem[...] = total[:, left : left + width].astype(y.dtype)
        plgpu.commit_smem()
        _store_rows(y_smem, y, rows, column + left)


def _store_rows(y_smem: Any, y: Any, rows: Rows, column: Array) -> None:
    """Copies in pieces of 64, 32, ... 1 rows, since a copy has a fixed size."""
    piece, width = y_smem.shape
    while piece:
        offset = rows.first + (rows.size & -(2 * piece))  # after the larger pieces

        @pl.when(rows.size & piece != 0)
        def _(piece=piece, offset=offset):
            plgpu.copy_smem_to_gmem(
                y_smem.at[pl.ds(offset, piece)],
                y.at[pl.ds(rows.start + offset, piece), pl.ds(column, width)],
            )

        piece //= 2
