"""Products of rows with matrices of four bits on Hopper GPUs (see `quantization.int4`).

The tensor cores have no use for four bits: a block is dequantised into shared memory as bfloat16,
each value code * float32(scale) rounded once, and multiplied from there.

Words hold eight codes along K. Their row k / 8 = 64 b + 4 g + j (g < 16, j < 4) is copied to row
16 j + g of block b: there all words lie beside their scales, whose 16 rows are copied four times
(from the L2 cache, but for the first). Nibble i of a block is then a matrix of 64 rows, for
k = 512 b + 32 g + 8 j + i. The order of the sum does not matter: the rows' columns are brought into
the order (b, i, j, g) before, or the result's out of it behind (`shuffle`, `unshuffle`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import hopper, hopper_products
from kimi_jax.kernels.hopper_products import Product, Tiles
from kimi_jax.quantization.int4 import CODES_PER_WORD, GROUP_SIZE, Int4Weight

PLANE = 64  # rows of words that are dequantised together
BLOCK = PLANE * CODES_PER_WORD  # inputs of such a block
_WORDS = GROUP_SIZE // CODES_PER_WORD  # of a group
_GROUPS = BLOCK // GROUP_SIZE  # of a block
_ORDER = (_GROUPS, _WORDS, CODES_PER_WORD)


def shuffle(x: Float[Array, "A K"]) -> Float[Array, "A K"]:
    """Brings each 512 columns from the order (g, j, i) into the order (i, j, g)."""
    return x.reshape(x.shape[0], -1, *_ORDER).transpose(0, 1, 4, 3, 2).reshape(x.shape)


def unshuffle(x: Float[Array, "A K"]) -> Float[Array, "A K"]:
    """Undoes `shuffle`."""
    return x.reshape(x.shape[0], -1, *_ORDER[::-1]).transpose(0, 1, 4, 3, 2).reshape(x.shape)


def plane(words: Int[Array, "rows N"], scales: Float[Array, "rows N"], nibble: int) -> Array:
    """Returns the values of one nibble of each word, in bfloat16; scales are float32."""
    codes = ((words >> (4 * nibble)) & 15) - 8
    return (codes.astype(jnp.float32) * scales).astype(jnp.bfloat16)


def copy_block(weight: Any, group: Array, block: Array, columns: Any, to: Any, barrier: Any) -> None:
    """Starts the eight copies of a block's words and scales; see the module's text for the order.

    Args:
      weight: words [E, K / 32, 4, N] and scales [E, K / 32, N] in memory.
      group: which matrix.
      block: which 512 inputs.
      columns: slice of N.
      to: words [64, n] and scales [64, n] in shared memory.
      barrier: to be told.
    """
    (words, scales), (words_to, scales_to) = weight, to
    groups = pl.ds(block * _GROUPS, _GROUPS)
    for j in range(_WORDS):
        rows = slice(j * _GROUPS, (j + 1) * _GROUPS)
        plgpu.copy_gmem_to_smem(words.at[group, groups, j, columns], words_to.at[rows], barrier)
        plgpu.copy_gmem_to_smem(scales.at[group, groups, columns], scales_to.at[rows], barrier)


COPIES = 2 * _WORDS


def multiply(x, w, group_sizes, *, interpret=False):
    """x [A, K] w[g] [K, N]."""
    num_rows, contracted = x.shape
    num_columns = w.shape[2]
    tiles = hopper_products.cut(hopper_products.with_spare_rows(group_sizes, num_rows), num_rows)
    scratch = {
        "x_blocks": plgpu.SMEM((_SLOTS, hopper.COMPUTE, hopper.ROWS, PLANE), x.dtype),
        "words": plgpu.SMEM((_BLOCK_SLOTS, PLANE, _STRIP), jnp.int32),
        "scales": plgpu.SMEM((_BLOCK_SLOTS, PLANE, _STRIP), jnp.bfloat16),
        "planes": plgpu.SMEM((2, PLANE, _STRIP), jnp.bfloat16),
        "y_blocks": plgpu.SMEM((hopper.COMPUTE, hopper.ROWS, _STRIP), x.dtype),
        "ring": hopper.ring_barriers(_SLOTS, num_copies=hopper.COMPUTE),
        "block_ring": hopper.ring_barriers(_BLOCK_SLOTS, num_copies=COPIES),
        "ready": plgpu.Barrier(num_arrivals=hopper.COMPUTE),
    }
    return hopper.kernel(
        functools.partial(_multiply_kernel),
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        scratch=scratch,
        grid={"block": min(hopper_products.NUM_BLOCKS, tiles.group.size * num_columns // _STRIP)},
        cost=_cost(num_rows, w, x.dtype),
        interpret=interpret,
    )(*tiles, shuffle(x), _grouped(w.codes), w.scales)


_SLOTS = 4
_BLOCK_SLOTS = 2
_STRIP = 128


def _grouped(codes):
    num_groups, words, num_columns = codes.shape
    return codes.reshape(num_groups, words // _WORDS, _WORDS, num_columns)


def _cost(num_rows, w, dtype):
    _, inputs, outputs = w.shape
    weight = w.codes.size * w.codes.dtype.itemsize + w.scales.size * w.scales.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * num_rows * inputs * outputs,
        bytes_accessed=dtype.itemsize * num_rows * (inputs + outputs) + weight,
        transcendentals=0,
    )


class _Unit(NamedTuple):
    steps: Array
    tile: Array
    group: Array
    start: Array
    column: Array


def _meet(ready):
    """Waits until both warpgroups have written their part of a block."""
    plgpu.commit_smem()
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)


def _multiply_kernel(
    *refs, x_blocks, words, scales, planes, y_blocks, ring, block_ring, ready
):
    *plan, x, codes_gmem, scales_gmem, y = refs
    tiles = Tiles(*plan)
    strips = y.shape[1] // _STRIP

    def unit(number):
        tile = jax.lax.div(number, strips)
        group = tiles.group[tile]
        return _Unit(
            steps=jnp.where(group < codes_gmem.shape[0], x.shape[1] // PLANE, 0),
            tile=tile,
            group=group,
            start=pl.multiple_of(tiles.start[tile], hopper_products.ALIGNMENT),
            column=jax.lax.rem(number, strips) * _STRIP,
        )

    def copies(at, barrier):
        unit = at.unit
        for half in range(hopper.COMPUTE):
            rows = pl.ds(unit.start + half * hopper.ROWS, hopper.ROWS)
            plgpu.copy_gmem_to_smem(
                x.at[rows, pl.ds(at.step * PLANE, PLANE)], x_blocks.at[at.slot, half], barrier
            )

        @pl.when(jax.lax.rem(at.step, CODES_PER_WORD) == 0)
        def _():
            block_done = jax.lax.div(at.done, CODES_PER_WORD)
            slot = jax.lax.rem(block_done, _BLOCK_SLOTS)

            @pl.when(block_done >= _BLOCK_SLOTS)
            def _():
                plgpu.barrier_wait(block_ring.empty.at[slot])

            copy_block(
                (codes_gmem, scales_gmem),
                unit.group,
                jax.lax.div(at.step, CODES_PER_WORD),
                pl.ds(unit.column, _STRIP),
                (words.at[slot], scales.at[slot]),
                block_ring.full.at[slot],
            )

    def product(warpgroup):
        columns = pl.ds(pl.multiple_of(warpgroup * PLANE, PLANE), PLANE)

        def begin(at):
            slot = jax.lax.rem(jax.lax.div(at.done, CODES_PER_WORD), _BLOCK_SLOTS)
            plgpu.barrier_wait(block_ring.full.at[slot])
            state = words[slot, :, columns], scales[slot, :, columns].astype(jnp.float32)
            plgpu.barrier_arrive(block_ring.empty.at[slot])
            return state

        def multiply(at, total, state):
            to = jax.lax.rem(at.done, 2)
            planes[to, :, columns] = plane(*state, at.part)
            _meet(ready)
            plgpu.wgmma(total, x_blocks.at[at.slot, warpgroup], planes.at[to])

        def finish(unit, total):
            first, size = tiles.first[unit.tile], tiles.size[unit.tile]
            rows = hopper_products.rows_of_half(unit.start, first, size, warpgroup)
            hopper_products.store(total, y_blocks.at[warpgroup], y, rows, unit.column)

        return Product(
            unit, copies, multiply, finish, (hopper.ROWS, _STRIP), begin, CODES_PER_WORD
        )

    hopper_products.run(tiles.count[0] * strips, ring, product)


def multiply_transposed(d_y, w, group_sizes, *, interpret=False):
    """d_y [A, N] w[g]^T [N, K]."""
    num_rows, _ = d_y.shape
    num_inputs = w.shape[1]
    tiles = hopper_products.cut(hopper_products.with_spare_rows(group_sizes, num_rows), num_rows)
    scratch = {
        "d_y_blocks": plgpu.SMEM((_SLOTS, hopper.COMPUTE, hopper.ROWS, PLANE), d_y.dtype),
        "words": plgpu.SMEM((_SLOTS, PLANE, PLANE), jnp.int32),
        "scales": plgpu.SMEM((_SLOTS, PLANE, PLANE), jnp.bfloat16),
        "planes": plgpu.SMEM((2, hopper.COMPUTE * PLANE, PLANE), jnp.bfloat16),
        "d_x_blocks": plgpu.SMEM((hopper.COMPUTE, hopper.ROWS, _STRIP), d_y.dtype),
        "ring": hopper.ring_barriers(_SLOTS, num_copies=hopper.COMPUTE + COPIES),
        "ready": plgpu.Barrier(num_arrivals=hopper.COMPUTE),
    }
    d_x = hopper.kernel(
        _multiply_transposed_kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_inputs), d_y.dtype),
        scratch=scratch,
        grid={"block": min(hopper_products.NUM_BLOCKS, tiles.group.size * num_inputs // _STRIP)},
        cost=_cost(num_rows, w, d_y.dtype),
        interpret=interpret,
    )(*tiles, d_y, _grouped(w.codes), w.scales)
    return unshuffle(d_x)


def _multiply_transposed_kernel(
    *refs, d_y_blocks, words, scales, planes, d_x_blocks, ring, ready
):
    *plan, d_y, codes_gmem, scales_gmem, d_x = refs
    tiles = Tiles(*plan)
    strips = d_x.shape[1] // _STRIP

    def unit(number):
        tile = jax.lax.div(number, strips)
        group = tiles.group[tile]
        return _Unit(
            steps=jnp.where(group < codes_gmem.shape[0], d_y.shape[1] // PLANE, 0),
            tile=tile,
            group=group,
            start=pl.multiple_of(tiles.start[tile], hopper_products.ALIGNMENT),
            column=jax.lax.rem(number, strips) * _STRIP,
        )

    def copies(at, barrier):
        unit = at.unit
        columns = pl.ds(at.step * PLANE, PLANE)
        for half in range(hopper.COMPUTE):
            rows = pl.ds(unit.start + half * hopper.ROWS, hopper.ROWS)
            plgpu.copy_gmem_to_smem(d_y.at[rows, columns], d_y_blocks.at[at.slot, half], barrier)
        copy_block(
            (codes_gmem, scales_gmem),
            unit.group,
            jax.lax.div(unit.column, BLOCK),
            columns,
            (words.at[at.slot], scales.at[at.slot]),
            barrier,
        )

    def product(warpgroup):
        rows = pl.ds(pl.multiple_of(warpgroup * PLANE, PLANE), PLANE)

        def multiply(at, total, state):
            nibble = jax.lax.rem(jax.lax.div(at.unit.column, PLANE), CODES_PER_WORD) + warpgroup
            to = jax.lax.rem(at.done, 2)
            planes[to, rows] = plane(
                words[at.slot], scales[at.slot].astype(jnp.float32), nibble
            )
            _meet(ready)
            plgpu.wgmma(
                total, d_y_blocks.at[at.slot, warpgroup], planes.at[to].transpose((1, 0))
            )

        def finish(unit, total):
            first, size = tiles.first[unit.tile], tiles.size[unit.tile]
            rows = hopper_products.rows_of_half(unit.start, first, size, warpgroup)
            hopper_products.store(total, d_x_blocks.at[warpgroup], d_x, rows, unit.column)

        return Product(unit, copies, multiply, finish, (hopper.ROWS, _STRIP))

    hopper_products.run(tiles.count[0] * strips, ring, product)
