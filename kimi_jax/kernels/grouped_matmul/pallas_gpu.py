import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import hopper, hopper_products
from kimi_jax.kernels.hopper_products import Product, Tiles

_CONTRACTED = 64  # of a block: 128 bytes of bfloat16
_SLOTS = 4
_STORED = 128  # columns that go to memory at a time


def forward(x, w, group_sizes, *, interpret=False):
    return _multiply(x, w, group_sizes, transposed=False, interpret=interpret)


def input_gradient(d_y, w, group_sizes, *, interpret=False):
    return _multiply(d_y, w, group_sizes, transposed=True, interpret=interpret)


def _strip(width: int) -> int:
    return 256 if width % 256 == 0 else 128


def _multiply(x, w, group_sizes, transposed, interpret):
    num_rows, contracted = x.shape
    num_columns = w.shape[1 if transposed else 2]
    strip = _strip(num_columns)
    tiles = hopper_products.cut(
        hopper_products.with_spare_rows(group_sizes, num_rows), num_rows
    )
    block = (strip, _CONTRACTED) if transposed else (_CONTRACTED, strip)
    scratch = {
        "x_blocks": plgpu.SMEM((_SLOTS, hopper.COMPUTE, hopper.ROWS, _CONTRACTED), x.dtype),
        "w_blocks": plgpu.SMEM((_SLOTS, *block), w.dtype),
        "y_blocks": plgpu.SMEM((hopper.COMPUTE, hopper.ROWS, _STORED), x.dtype),
        "ring": hopper.ring_barriers(_SLOTS, num_copies=hopper.COMPUTE + 1),
    }
    return hopper.kernel(
        functools.partial(_multiply_kernel, transposed=transposed, strip=strip),
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        scratch=scratch,
        grid={"block": min(hopper_products.NUM_BLOCKS, tiles.group.size * num_columns // strip)},
        cost=pl.CostEstimate(
            flops=2 * num_rows * contracted * num_columns,
            bytes_accessed=x.dtype.itemsize * (num_rows * (contracted + num_columns) + w.size),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*tiles, x, w)


class _Unit(NamedTuple):
    steps: Array
    tile: Array
    group: Array
    start: Array
    column: Array


def _multiply_kernel(*refs, x_blocks, w_blocks, y_blocks, ring, transposed, strip):
    *plan, x, w, y = refs
    tiles = Tiles(*plan)
    strips = y.shape[1] // strip

    def unit(number):
        tile = jax.lax.div(number, strips)
        group = tiles.group[tile]
        return _Unit(
            steps=jnp.where(group < w.shape[0], x.shape[1] // _CONTRACTED, 0),
            tile=tile,
            group=group,
            start=pl.multiple_of(tiles.start[tile], hopper_products.ALIGNMENT),
            column=jax.lax.rem(number, strips) * strip,
        )

    def copies(at, barrier):
        unit, step, _, slot = at
        inner = pl.ds(step * _CONTRACTED, _CONTRACTED)
        for half in range(hopper.COMPUTE):
            rows = pl.ds(unit.start + half * hopper.ROWS, hopper.ROWS)
            plgpu.copy_gmem_to_smem(x.at[rows, inner], x_blocks.at[slot, half], barrier)
        outer = pl.ds(unit.column, strip)
        part = (outer, inner) if transposed else (inner, outer)
        plgpu.copy_gmem_to_smem(w.at[unit.group, *part], w_blocks.at[slot], barrier)

    def product(warpgroup):
        def multiply(at, total, state):
            w_block = w_blocks.at[at.slot]
            plgpu.wgmma(
                total,
                x_blocks.at[at.slot, warpgroup],
                w_block.transpose((1, 0)) if transposed else w_block,
            )

        def finish(unit, total):
            first, size = tiles.first[unit.tile], tiles.size[unit.tile]
            rows = hopper_products.rows_of_half(unit.start, first, size, warpgroup)
            hopper_products.store(total, y_blocks.at[warpgroup], y, rows, unit.column)

        return Product(unit, copies, multiply, finish, (hopper.ROWS, strip))

    hopper_products.run(tiles.count[0] * strips, ring, product)


def weight_gradient(x, d_y, group_sizes, *, interpret=False):
    (num_rows, num_inputs), num_outputs = x.shape, d_y.shape[1]
    num_groups = group_sizes.shape[0]
    strip = _strip(num_outputs)
    sizes = group_sizes.astype(jnp.int32)
    end = jnp.cumsum(sizes)
    units = num_groups * (num_inputs // hopper_products.TILE_ROWS) * (num_outputs // strip)
    scratch = {
        "x_blocks": plgpu.SMEM((_SLOTS, hopper.COMPUTE, _CONTRACTED, hopper.ROWS), x.dtype),
        "d_y_blocks": plgpu.SMEM((_SLOTS, _CONTRACTED, strip), x.dtype),
        "d_w_blocks": plgpu.SMEM((hopper.COMPUTE, hopper.ROWS, _STORED), x.dtype),
        "ring": hopper.ring_barriers(_SLOTS, num_copies=hopper.COMPUTE + 1),
    }
    return hopper.kernel(
        functools.partial(_weight_gradient_kernel, strip=strip),
        out_type=jax.ShapeDtypeStruct((num_groups, num_inputs, num_outputs), x.dtype),
        scratch=scratch,
        grid={"block": min(hopper_products.NUM_BLOCKS, units)},
        cost=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_outputs,
            bytes_accessed=x.dtype.itemsize
            * (num_rows * (num_inputs + num_outputs) + num_groups * num_inputs * num_outputs),
            transcendentals=0,
        ),
        interpret=interpret,
    )(end - sizes, end, x, d_y)


class _Sum(NamedTuple):
    steps: Array
    group: Array
    start: Array
    row: Array
    column: Array


def _weight_gradient_kernel(
    begin, end, x, d_y, d_w, *, x_blocks, d_y_blocks, d_w_blocks, ring, strip
):
    groups, inputs, outputs = d_w.shape
    strips, stripes = outputs // strip, inputs // hopper_products.TILE_ROWS

    def unit(number):
        group = jax.lax.div(number, strips * stripes)
        within = jax.lax.rem(number, strips * stripes)
        start = jax.lax.div(begin[group], hopper_products.ALIGNMENT) * hopper_products.ALIGNMENT
        steps = jax.lax.div(end[group] - start + _CONTRACTED - 1, _CONTRACTED)
        return _Sum(
            steps=jnp.where(end[group] > begin[group], steps, 0),
            group=group,
            start=start,
            row=jax.lax.div(within, strips) * hopper_products.TILE_ROWS,
            column=jax.lax.rem(within, strips) * strip,
        )

    def copies(at, barrier):
        unit, step, _, slot = at
        rows = pl.ds(unit.start + step * _CONTRACTED, _CONTRACTED)
        for half in range(hopper.COMPUTE):
            columns = pl.ds(unit.row + half * hopper.ROWS, hopper.ROWS)
            plgpu.copy_gmem_to_smem(x.at[rows, columns], x_blocks.at[slot, half], barrier)
        columns = pl.ds(unit.column, strip)
        plgpu.copy_gmem_to_smem(d_y.at[rows, columns], d_y_blocks.at[slot], barrier)

    def product(warpgroup):
        def multiply(at, total, state):
            unit, step, _, slot = at
            row = unit.start + step * _CONTRACTED
            first, last = begin[unit.group] - row, end[unit.group] - row

            @pl.when((first > 0) | (last < _CONTRACTED))
            def _():
                for block in (x_blocks.at[slot, warpgroup], d_y_blocks.at[slot]):
                    hopper_products.keep_rows(block, first, last)
                plgpu.commit_smem()

            plgpu.wgmma(total, x_blocks.at[slot, warpgroup].transpose((1, 0)), d_y_blocks.at[slot])

        def finish(unit, total):
            rows = hopper_products.Rows(
                unit.row + warpgroup * hopper.ROWS, jnp.int32(0), jnp.int32(hopper.ROWS)
            )
            hopper_products.store(
                total, d_w_blocks.at[warpgroup], d_w.at[unit.group], rows, unit.column
            )

        return Product(unit, copies, multiply, finish, (hopper.ROWS, strip))

    hopper_products.run(groups * strips * stripes, ring, product)
