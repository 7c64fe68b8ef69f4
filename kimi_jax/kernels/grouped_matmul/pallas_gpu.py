"""Grouped products by Mosaic GPU kernels for Hopper, whose work follows the rows.

Compiled for an H100 and interpreted on a CPU; never timed.

`forward` and `input_gradient` are one kernel (weights of four bits: `hopper/int4_products.py`).

* Grid: 132 programs that stay; a unit is a tile of 128 rows of one group times 256 columns.
* Blocks: 128 x 64 of the rows and 64 x 256 of the group's matrix, four of each in shared memory.
* Bytes: rows once for each 256 columns and matrices once for each 128 rows, mostly from the L2
  cache, since units of one tile and of one group run at the same time. Results once.
* Invariant: a row is written by the one unit of its group; rows of no group are a group without a
  product, which writes zeros.

`weight_gradient`: a unit is 128 x 256 of a group's gradient, and its sum takes 64 rows at a time.
Rows of other groups in the first and the last block are cleared in shared memory before.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.grouped_matmul.gradients import differentiable
from kimi_jax.kernels.hopper import int4_products, products, program
from kimi_jax.kernels.hopper.products import At, RowUnit, Tiles
from kimi_jax.kernels.hopper.ring import keep_rows, meet, ring_barriers
from kimi_jax.quantization.int4 import Int4Weight

_SUMMED = 64  # of a block, along the sum: 128 bytes of bfloat16
_SLOTS = 4
_STAGED = 128  # columns of results that wait in shared memory


def forward(
    x: Float[Array, "A K"],
    w: Float[Array, "E K N"] | Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Float[Array, "A N"]:
    """Returns x w[g]; rows of no group give zeros.

    Args:
      x: rows sorted by group, in bfloat16.
      w: matrices.
      group_sizes: rows of each group.
      interpret: runs on any platform, slowly.

    Raises:
      NotImplementedError: another dtype than bfloat16, or not for a Hopper GPU.
    """
    program.require("grouped_matmul", x.dtype, interpret)
    if isinstance(w, Int4Weight):
        return int4_products.multiply(x, w, group_sizes, interpret=interpret)
    return _multiply(x, w, group_sizes, transposed=False, interpret=interpret)


def input_gradient(
    d_y: Float[Array, "A N"],
    w: Float[Array, "E K N"] | Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Float[Array, "A K"]:
    """Returns d_y w[g]^T; arguments as in `forward`."""
    program.require("grouped_matmul", d_y.dtype, interpret)
    if isinstance(w, Int4Weight):
        return int4_products.multiply_transposed(d_y, w, group_sizes, interpret=interpret)
    return _multiply(d_y, w, group_sizes, transposed=True, interpret=interpret)


def weight_gradient(
    x: Float[Array, "A K"],
    d_y: Float[Array, "A N"],
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Float[Array, "E K N"]:
    """Returns x_g^T d_y_g in the rows' dtype, zeros for a group without rows."""
    program.require("grouped_matmul", x.dtype, interpret)
    num_inputs, num_outputs = x.shape[1], d_y.shape[1]
    d_w = _sum_rows(_pad(x, 1), _pad(d_y, 1), group_sizes.astype(jnp.int32), interpret)
    return d_w[:, :num_inputs, :num_outputs]


def _pad(x: Array, num_dimensions: int) -> Array:
    """Fills the last dimensions up to whole tiles; K2's sizes are."""
    return products.pad(x, (program.TILE,) * num_dimensions)


def _strip(width: int) -> int:
    return 256 if width % 256 == 0 else 128


def _multiply(x: Array, w: Array, group_sizes: Array, transposed: bool, interpret: bool) -> Array:
    width = w.shape[1 if transposed else 2]
    x, w = _pad(x, 1), _pad(w, 2)
    (num_rows, summed), num_columns = x.shape, w.shape[1 if transposed else 2]
    strip = _strip(num_columns)
    tiles = products.cut(products.with_spare_rows(group_sizes, num_rows), num_rows)
    block = (strip, _SUMMED) if transposed else (_SUMMED, strip)
    y = program.kernel(
        functools.partial(_multiply_kernel, transposed=transposed, strip=strip),
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        scratch={
            "x_blocks": plgpu.SMEM((_SLOTS, program.COMPUTE, program.ROWS, _SUMMED), x.dtype),
            "w_blocks": plgpu.SMEM((_SLOTS, *block), w.dtype),
            "staged": plgpu.SMEM((program.COMPUTE, program.ROWS, _STAGED), x.dtype),
            "ring": ring_barriers(_SLOTS, num_copies=program.COMPUTE + 1),
        },
        grid=products.grid(tiles.group.size * (num_columns // strip)),
        cost=pl.CostEstimate(
            flops=2 * num_rows * summed * num_columns,
            bytes_accessed=x.dtype.itemsize * (num_rows * (summed + num_columns) + w.size),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*tiles, x, w)
    return y[:, :width]


def _multiply_kernel(*refs, x_blocks, w_blocks, staged, ring, transposed, strip):
    *plan, x, w, y = refs
    parts = _RowsTimesMatrix(Tiles(*plan), x, w, y, x_blocks, w_blocks, staged, transposed, strip)
    products.run(parts.tiles.count[0] * (y.shape[1] // strip), ring, parts)


class _RowsTimesMatrix(NamedTuple):
    """One unit is 128 rows times `strip` columns; see `products.Parts`."""

    tiles: Tiles
    x: Any
    w: Any
    y: Any
    x_blocks: Any  # [slots, 2, 64, 64]
    w_blocks: Any  # [slots, 64, strip], or [slots, strip, 64] if transposed
    staged: Any  # [2, 64, 128]
    transposed: bool
    strip: int
    unrolled: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return program.ROWS, self.strip

    def unit(self, number):
        columns = self.y.shape[1], self.strip
        steps = self.x.shape[1] // _SUMMED
        return products.row_unit(self.tiles, number, self.w.shape[0], columns, steps)

    def copies(self, at: At, barrier):
        summed = pl.ds(at.step * _SUMMED, _SUMMED)
        columns = pl.ds(at.unit.column, self.strip)
        products.copy_rows(self.x, at.unit.start, summed, self.x_blocks.at[at.slot], barrier)
        part = (columns, summed) if self.transposed else (summed, columns)
        plgpu.copy_gmem_to_smem(self.w.at[at.unit.group, *part], self.w_blocks.at[at.slot], barrier)

    def begin(self, done, warpgroup):
        return None

    def multiply(self, at: At, warpgroup, sums, state):
        w = self.w_blocks.at[at.slot]
        w = w.transpose((1, 0)) if self.transposed else w
        plgpu.wgmma(sums, self.x_blocks.at[at.slot, warpgroup], w)

    def finish(self, unit: RowUnit, warpgroup, sums):
        products.store_rows(self.tiles, unit, warpgroup, sums, (self.staged, self.y))


def _sum_rows(x: Array, d_y: Array, group_sizes: Array, interpret: bool) -> Array:
    (num_rows, num_inputs), num_outputs = x.shape, d_y.shape[1]
    num_groups, strip = group_sizes.shape[0], _strip(num_outputs)
    end = jnp.cumsum(group_sizes)
    tiles_of_group = (num_inputs // program.TILE) * (num_outputs // strip)
    results = num_groups * num_inputs * num_outputs
    return program.kernel(
        functools.partial(_sum_rows_kernel, strip=strip),
        out_type=jax.ShapeDtypeStruct((num_groups, num_inputs, num_outputs), x.dtype),
        scratch={
            "x_blocks": plgpu.SMEM((_SLOTS, program.COMPUTE, _SUMMED, program.ROWS), x.dtype),
            "d_y_blocks": plgpu.SMEM((_SLOTS, _SUMMED, strip), x.dtype),
            "staged": plgpu.SMEM((program.COMPUTE, program.ROWS, _STAGED), x.dtype),
            "cleared": plgpu.Barrier(num_arrivals=program.COMPUTE),
            "ring": ring_barriers(_SLOTS, num_copies=program.COMPUTE + 1),
        },
        grid=products.grid(num_groups * tiles_of_group),
        cost=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_outputs,
            bytes_accessed=x.dtype.itemsize * (num_rows * (num_inputs + num_outputs) + results),
            transcendentals=0,
        ),
        interpret=interpret,
    )(end - group_sizes, end, x, d_y)


def _sum_rows_kernel(*refs, x_blocks, d_y_blocks, staged, cleared, ring, strip):
    parts = _SumOfRows(*refs, x_blocks, d_y_blocks, staged, cleared, strip)
    products.run(parts.d_w.shape[0] * parts.tiles_of_group, ring, parts)


class _Sum(NamedTuple):
    """A unit of `_SumOfRows`: which part of which group's gradient."""

    steps: Array
    group: Array
    start: Array  # first row of its first block
    row: Array
    column: Array


class _SumOfRows(NamedTuple):
    """One unit is 128 x `strip` of a group's x^T d_y; see `products.Parts`."""

    begin_of: Any  # [E], first row of each group
    end_of: Any  # [E]
    x: Any
    d_y: Any
    d_w: Any
    x_blocks: Any  # [slots, 2, 64, 64]
    d_y_blocks: Any  # [slots, 64, strip]
    staged: Any  # [2, 64, 128]
    cleared: Any
    strip: int
    unrolled: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return program.ROWS, self.strip

    @property
    def tiles_of_group(self) -> int:
        return self.d_w.shape[1] // program.TILE * (self.d_w.shape[2] // self.strip)

    def unit(self, number):
        group = jax.lax.div(number, self.tiles_of_group)
        within = jax.lax.rem(number, self.tiles_of_group)
        strips = self.d_w.shape[2] // self.strip
        begin, end = self.begin_of[group], self.end_of[group]
        start = jax.lax.div(begin, products.ALIGNMENT) * products.ALIGNMENT
        return _Sum(
            steps=jnp.where(end > begin, jax.lax.div(end - start + _SUMMED - 1, _SUMMED), 0),
            group=group,
            start=start,
            row=jax.lax.div(within, strips) * program.TILE,
            column=jax.lax.rem(within, strips) * self.strip,
        )

    def copies(self, at: At, barrier):
        rows = pl.ds(at.unit.start + at.step * _SUMMED, _SUMMED)
        for half in range(program.COMPUTE):
            columns = pl.ds(at.unit.row + half * program.ROWS, program.ROWS)
            plgpu.copy_gmem_to_smem(
                self.x.at[rows, columns], self.x_blocks.at[at.slot, half], barrier
            )
        columns = pl.ds(at.unit.column, self.strip)
        plgpu.copy_gmem_to_smem(self.d_y.at[rows, columns], self.d_y_blocks.at[at.slot], barrier)

    def begin(self, done, warpgroup):
        return None

    def multiply(self, at: At, warpgroup, sums, state):
        x, d_y = self.x_blocks.at[at.slot, warpgroup], self.d_y_blocks.at[at.slot]
        row = at.unit.start + at.step * _SUMMED
        first, end = self.begin_of[at.unit.group] - row, self.end_of[at.unit.group] - row

        @pl.when((first > 0) | (end < _SUMMED))
        def _():
            keep_rows(x, first, end)
            half = self.strip // program.COMPUTE
            columns = pl.ds(pl.multiple_of(warpgroup * half, half), half)
            keep_rows(d_y.at[:, columns], first, end)
            plgpu.commit_smem()
            meet(self.cleared)

        plgpu.wgmma(sums, x.transpose((1, 0)), d_y)

    def finish(self, unit: _Sum, warpgroup, sums):
        rows = products.Rows(
            start=unit.row + warpgroup * program.ROWS,
            first=jnp.int32(0),
            size=jnp.int32(program.ROWS),
        )
        d_w = self.d_w.at[unit.group]
        products.store(sums, self.staged.at[warpgroup], d_w, rows, unit.column)


grouped_matmul = differentiable(forward, input_gradient, weight_gradient)
