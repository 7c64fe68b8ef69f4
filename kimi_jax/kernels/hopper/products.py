"""Products of rows with matrices on Hopper GPUs, as programs that stay on their multiprocessor.

Each program of a grid of `MULTIPROCESSORS` takes result tiles ("units") in turn. One of its
warpgroups copies blocks of the factors to a ring in shared memory, without a pause from unit to
unit; two others multiply, each 64 of a tile's 128 rows, with sums in float32 in registers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.hopper.ring import Ring

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
    tiles_of_group = jnp.where(group_sizes > 0, -((aligned - end) // program.TILE), 0)
    last_tile = jnp.cumsum(tiles_of_group)
    most = (num_rows + num_groups * (program.TILE + ALIGNMENT)) // program.TILE
    index = jnp.arange(most, dtype=group_sizes.dtype)
    group = jnp.sum(index[:, None] >= last_tile[None, :], axis=1, dtype=group_sizes.dtype)
    group = jnp.minimum(group, num_groups - 1)
    start = aligned[group] + (index - (last_tile - tiles_of_group)[group]) * program.TILE
    first = jnp.maximum(begin[group] - start, 0)
    size = jnp.minimum(end[group] - start, program.TILE) - first
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


@runtime_checkable
class Parts(Protocol):
    """What a kernel does for a unit, an object with `steps`, the number of blocks to multiply."""

    shape: tuple[int, int]  # of one warpgroup's sums
    unrolled: int  # blocks that share what `begin` returns

    def unit(self, number: Array) -> Any:
        """Returns a unit, given its number."""

    def copies(self, at: At, barrier: Any) -> None:
        """Starts the copies of a block; each arrives at the barrier once."""

    def begin(self, done: Array, warpgroup: Array) -> Any:
        """Returns what `multiply` needs of the `unrolled` blocks after the first `done`."""

    def multiply(self, at: At, warpgroup: Array, sums: Any, state: Any) -> None:
        """Adds a block's product to the sums."""

    def finish(self, unit: Any, warpgroup: Array, sums: Array) -> None:
        """Stores the sums."""


def run(num_units: Array | int, ring: Ring, parts: Parts) -> None:
    """Computes this program's share of the units.

    Args:
      num_units: of all programs together.
      ring: blocks of the factors.
      parts: what is done.
    """
    block, num_blocks = jax.lax.axis_index("block"), jax.lax.axis_size("block")
    own_units = jax.lax.div(num_units - block + num_blocks - 1, num_blocks)

    def for_units(visit: Callable[[Any, Array], Array]) -> None:
        jax.lax.fori_loop(
            0,
            own_units,
            lambda i, done: visit(parts.unit(block + i * num_blocks), done),
            jnp.int32(0),
        )

    def copy() -> None:
        for_units(lambda unit, done: _fill(parts, ring, unit, done))

    def compute(warpgroup: Array) -> None:
        for_units(lambda unit, done: _compute(parts, ring, unit, warpgroup, done))
        plgpu.wait_smem_to_gmem(0)

    program.specialise(compute, copy)


def _fill(parts: Parts, ring: Ring, unit: Any, done: Array) -> Array:
    """Fills slots with a unit's blocks, each once it is free; returns the blocks copied so far."""

    def step_of(step: Array, done: Array) -> Array:
        slot = ring.await_free(done)
        parts.copies(At(unit, step, done, slot), ring.full.at[slot])
        return done + 1

    return jax.lax.fori_loop(0, unit.steps, step_of, done)


def _compute(parts: Parts, ring: Ring, unit: Any, warpgroup: Array, done: Array) -> Array:
    """Sums a unit's products and stores them; returns the number of blocks used so far."""

    def give_back(done: Array) -> None:
        ring.give_back(done - 1)

    def multiply(sums: Any) -> Array:
        def steps(i: Array, done: Array) -> Array:
            state = None
            for part in range(parts.unrolled):
                step = i * parts.unrolled + part
                if part == 0:
                    state = parts.begin(done, warpgroup)
                at = At(unit, step, done, ring.await_block(done), part)
                parts.multiply(at, warpgroup, sums, state)
                # While this product runs, the slot of the one before is free again.
                plgpu.wgmma_wait(1)
                pl.when(at.step > 0)(functools.partial(give_back, done))
                done = done + 1
            return done

        jax.lax.fori_loop(0, jax.lax.div(unit.steps, parts.unrolled), steps, done)
        return sums[...]

    sums = pl.run_scoped(multiply, plgpu.ACC(parts.shape))
    done = done + unit.steps
    pl.when(unit.steps > 0)(functools.partial(give_back, done))
    parts.finish(unit, warpgroup, sums)
    return done


class RowUnit(NamedTuple):
    """A tile of rows times a strip of a matrix's columns."""

    steps: Array
    tile: Array
    group: Array
    start: Array
    column: Array


def row_unit(tiles: Tiles, number: Array, num_groups: int, columns: tuple[int, int], steps: int):
    """Returns a unit; without steps, if its rows are of no group.

    Args:
      tiles: as `cut` returns.
      number: of the unit; those of one tile follow each other.
      num_groups: without the one of spare rows.
      columns: of the result, and of a strip.
      steps: blocks along the sum.
    """
    width, strip = columns
    tile = jax.lax.div(number, width // strip)
    group = tiles.group[tile]
    return RowUnit(
        steps=jnp.where(group < num_groups, steps, 0),
        tile=tile,
        group=group,
        start=pl.multiple_of(tiles.start[tile], ALIGNMENT),
        column=jax.lax.rem(number, width // strip) * strip,
    )


def copy_rows(x: Any, start: Array, columns: Any, to: Any, barrier: Any) -> None:
    """Starts the two copies of a tile's rows, 64 for each warpgroup."""
    for half in range(program.COMPUTE):
        rows = pl.ds(start + half * program.ROWS, program.ROWS)
        plgpu.copy_gmem_to_smem(x.at[rows, columns], to.at[half], barrier)


def store_rows(tiles: Tiles, unit: RowUnit, half: Array, sums: Array, to: tuple[Any, Any]) -> None:
    """Stores those of one half's rows that belong to the unit's group.

    Args:
      tiles: as `cut` returns.
      unit: whose sums they are.
      half: 0 or 1.
      sums: [64, columns].
      to: [2, 64, n] in shared memory, and the result.
    """
    above = half * program.ROWS
    first = tiles.first[unit.tile] - above
    begin = jnp.clip(first, 0, program.ROWS)
    end = jnp.clip(first + tiles.size[unit.tile], 0, program.ROWS)
    rows = Rows(start=unit.start + above, first=begin, size=end - begin)
    staged, y = to
    store(sums, staged.at[half], y, rows, unit.column)


class Rows(NamedTuple):
    """Rows `first` to `first + size - 1` of a block whose row 0 is row `start` of an array."""

    start: Array
    first: Array
    size: Array


def store(total: Array, y_smem: Any, y: Any, rows: Rows, column: Array | int) -> None:
    """Writes the rows of a tile's sums, by way of shared memory."""
    width = y_smem.shape[1]
    for left in range(0, total.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_smem[...] = total[:, left : left + width].astype(y.dtype)
        plgpu.commit_smem()
        _store_rows(y_smem, y, rows, column + left)


def _store_rows(y_smem: Any, y: Any, rows: Rows, column: Array | int) -> None:
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


def grid(num_units: int) -> dict[str, int]:
    """Returns the grid of a kernel with so many units at most."""
    return {"block": min(program.MULTIPROCESSORS, num_units)}


def pad(x: Array, multiples: Sequence[int], value: int = 0) -> Array:
    """Fills the last dimensions up to multiples; copies x only where that is necessary."""
    kept = x.ndim - len(multiples)
    missing = [-size % multiple for size, multiple in zip(x.shape[kept:], multiples, strict=True)]
    if not any(missing):
        return x
    return jnp.pad(x, [(0, 0)] * kept + [(0, m) for m in missing], constant_values=value)
