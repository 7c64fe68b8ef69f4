import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import hopper

TILE_ROWS = 128
_BLOCK_K = 64
_SLOTS = 4
_STORED = 128
BLOCKS = 132


class Blocks(NamedTuple):
    x: object
    w: object


def forward(x, w, group_sizes, *, interpret=False):
    return _multiply(x, w, group_sizes, transposed=False, interpret=interpret)


def input_gradient(d_y, w, group_sizes, *, interpret=False):
    return _multiply(d_y, w, group_sizes, transposed=True, interpret=interpret)


def _multiply(x, w, group_sizes, transposed, interpret):
    rows, inner = x.shape
    groups = w.shape[0]
    outputs = w.shape[1 if transposed else 2]
    columns = 256 if outputs % 256 == 0 else 128
    spare = rows - jnp.sum(group_sizes, keepdims=True)
    tiles = cut(jnp.concatenate([group_sizes, spare]), rows)
    w_block = (columns, _BLOCK_K) if transposed else (_BLOCK_K, columns)
    scratch = {
        "x_smem": plgpu.SMEM((_SLOTS, hopper.COMPUTE, hopper.ROWS, _BLOCK_K), x.dtype),
        "w_smem": plgpu.SMEM((_SLOTS, *w_block), w.dtype),
        "y_smem": plgpu.SMEM((hopper.COMPUTE, hopper.ROWS, _STORED), x.dtype),
        "full": plgpu.Barrier(num_arrivals=1 + hopper.COMPUTE, num_barriers=_SLOTS),
        "empty": plgpu.Barrier(num_arrivals=hopper.COMPUTE, num_barriers=_SLOTS),
    }
    num_blocks = min(BLOCKS, tiles.group.shape[0] * (outputs // columns))
    cost = pl.CostEstimate(
        flops=2 * rows * inner * outputs,
        bytes_accessed=2 * (rows * (inner + outputs) + w.size),
        transcendentals=0,
    )
    body = functools.partial(_body, transposed=transposed, groups=groups, columns=columns)
    return hopper.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        scratch=scratch,
        grid={"block": num_blocks},
        cost=cost,
        interpret=interpret,
    )(tiles.count, tiles.group, tiles.start, tiles.first, tiles.size, x, w)


ALIGNMENT = 8


class Tiles(NamedTuple):
    """Tiles of 128 rows that start at multiples of 8; each works on rows of one group."""

    count: Array  # [1], number of tiles
    group: Array  # [tiles]
    start: Array  # [tiles], row at which the tile starts
    first: Array  # [tiles], first of its rows that belongs to the group
    size: Array  # [tiles], how many belong to it


def cut(group_sizes: Int[Array, "E"], num_rows: int) -> Tiles:
    """Cuts each group into tiles; the first starts up to 7 rows before its group."""
    num_groups = group_sizes.shape[0]
    num_tiles = (num_rows + num_groups * (TILE_ROWS + ALIGNMENT)) // TILE_ROWS
    end = jnp.cumsum(group_sizes)
    begin = end - group_sizes
    aligned = begin - begin % ALIGNMENT
    tiles_of = jnp.where(group_sizes > 0, -((aligned - end) // TILE_ROWS), 0)
    last = jnp.cumsum(tiles_of)
    index = jnp.arange(num_tiles, dtype=group_sizes.dtype)
    group = jnp.sum(index[:, None] >= last[None, :], axis=1, dtype=group_sizes.dtype)
    group = jnp.minimum(group, num_groups - 1)
    start = aligned[group] + (index - (last - tiles_of)[group]) * TILE_ROWS
    first = jnp.maximum(begin[group] - start, 0)
    size = jnp.minimum(end[group] - start, TILE_ROWS) - first
    return Tiles(count=last[-1:], group=group, start=start, first=first, size=size)


def _body(
    count, group_of, start_of, first_of, size_of, x, w, y, *, x_smem, w_smem, y_smem, full, empty, transposed,
    groups, columns
):
    strips = y.shape[1] // columns
    steps = x.shape[1] // _BLOCK_K
    block, num_blocks = jax.lax.axis_index("block"), jax.lax.axis_size("block")
    units = (count[0] * strips - block + num_blocks - 1) // num_blocks

    def unit(i):
        index = block + i * num_blocks
        tile, strip = jax.lax.div(index, strips), jax.lax.rem(index, strips)
        return tile, strip * columns, jnp.where(group_of[tile] < groups, steps, 0)

    def copy():
        def fill(i, done):
            tile, column, count = unit(i)
            group, start = group_of[tile], pl.multiple_of(start_of[tile], ALIGNMENT)

            def step(k, done):
                slot = jax.lax.rem(done, _SLOTS)

                @pl.when(done >= _SLOTS)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                inner, outer = pl.ds(k * _BLOCK_K, _BLOCK_K), pl.ds(column, columns)
                for part in range(hopper.COMPUTE):
                    rows = pl.ds(start + part * hopper.ROWS, hopper.ROWS)
                    plgpu.copy_gmem_to_smem(
                        x.at[rows, inner], x_smem.at[slot, part], full.at[slot]
                    )
                part = (outer, inner) if transposed else (inner, outer)
                plgpu.copy_gmem_to_smem(w.at[group, *part], w_smem.at[slot], full.at[slot])
                return done + 1

            return jax.lax.fori_loop(0, count, step, done)

        jax.lax.fori_loop(0, units, fill, jnp.int32(0))

    def compute(warpgroup):
        def finish(i, done):
            tile, column, count = unit(i)

            def product(total):
                def step(k, done):
                    slot = jax.lax.rem(done, _SLOTS)
                    plgpu.barrier_wait(full.at[slot])
                    w_block = w_smem.at[slot]
                    plgpu.wgmma(
                        total,
                        x_smem.at[slot, warpgroup],
                        w_block.transpose((1, 0)) if transposed else w_block,
                    )
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[jax.lax.rem(done - 1, _SLOTS)])

                    return done + 1

                jax.lax.fori_loop(0, count, step, done)
                return total[...]

            total = pl.run_scoped(product, plgpu.ACC((hopper.ROWS, columns)))
            done = done + count

            @pl.when(count > 0)
            def _():
                plgpu.barrier_arrive(empty.at[jax.lax.rem(done - 1, _SLOTS)])

            above = warpgroup * hopper.ROWS
            first = jnp.clip(first_of[tile] - above, 0, hopper.ROWS)
            last = jnp.clip(first_of[tile] + size_of[tile] - above, 0, hopper.ROWS)
            for left in range(0, columns, _STORED):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_smem[warpgroup] = total[:, left : left + _STORED].astype(y.dtype)
                plgpu.commit_smem()
                rows = Rows(start_of[tile] + above, first, last - first)
                store_rows(y_smem.at[warpgroup], y, rows, column + left)
            return done

        jax.lax.fori_loop(0, units, finish, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    hopper.specialise(compute, copy)


class Rows(NamedTuple):
    """Rows first to first + size - 1 of a block, whose row 0 is row `start` of the array."""

    start: Array
    first: Array
    size: Array


def store_rows(y_smem, y, rows, column):
    """Stores rows of a block, in pieces whose sizes are powers of two."""
    most, width = y_smem.shape
    piece = most
    while piece:
        done = rows.first + (rows.size & -(2 * piece))  # rows of the larger pieces

        @pl.when(rows.size & piece != 0)
        def _(piece=piece, done=done):
            plgpu.copy_smem_to_gmem(
                y_smem.at[pl.ds(done, piece)],
                y.at[pl.ds(rows.start + done, piece), pl.ds(column, width)],
            )

        piece //= 2
