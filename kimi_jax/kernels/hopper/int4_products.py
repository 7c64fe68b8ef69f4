"""Products of rows with matrices of four bits on Hopper GPUs (see `quantization.int4`).

Compiled for an H100 and interpreted on a CPU; never timed.

The tensor cores know no four bits: a block is dequantised into shared memory as bfloat16, each
value code * float32(scale) rounded once, and multiplied from there while the next one is
dequantised. Tiles of rows and units: `hopper/products.py`; a unit is 128 rows times 128 columns.

Words hold eight codes along K. Their row k / 8 = 64 b + 4 g + j (g < 16, j < 4) is copied to row
16 j + g of block b: there all words lie beside their scales, whose 16 rows are copied four times
(from the L2 cache, but for the first). Nibble i of a block is then a matrix of 64 rows, for
k = 512 b + 32 g + 8 j + i. The order of a sum does not matter: the rows' columns are brought into
the order (b, i, j, g) before, or the result's out of it behind (`shuffle`, `unshuffle`).

* Blocks of `multiply`: 128 x 64 of the rows for each nibble, and 64 x 128 words and scales for all
  eight. Of `multiply_transposed`: 128 x 64 of the rows, and 64 x 64 words and scales, of which a
  unit takes two nibbles.
* Bytes: matrices of 4.5 bits for a weight, from memory once if the units of a group find them in
  the L2 cache. The copy of the rows in another order is XLA's.
* Invariant: a value is dequantised once for each 128 rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.hopper import products, program
from kimi_jax.kernels.hopper.products import At, RowUnit, Tiles
from kimi_jax.kernels.hopper.ring import Ring, meet, ring_barriers
from kimi_jax.quantization.int4 import CODES_PER_WORD, GROUP_SIZE, ZERO_WORD, Int4Weight

PLANE = 64  # rows of words that are dequantised together
BLOCK = PLANE * CODES_PER_WORD  # inputs of such a block
_WORDS = GROUP_SIZE // CODES_PER_WORD  # of a group
_GROUPS = BLOCK // GROUP_SIZE  # of a block
_ORDER = (_GROUPS, _WORDS, CODES_PER_WORD)
_COPIES = 2 * _WORDS
STRIP = 128
SLOTS = 4
_BLOCK_SLOTS = 2


def multiply(
    x: Float[Array, "A K"], w: Int4Weight, group_sizes: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "A N"]:
    """Returns x w[g]; rows of no group give zeros.

    Args:
      x: rows sorted by group, in bfloat16.
      w: matrices [E, K, N].
      group_sizes: rows of each group.
      interpret: runs on any platform, slowly.

    Raises:
      NotImplementedError: the group size of the scales is no multiple of 32.
    """
    width = w.shape[2]
    w = whole_blocks(w)
    x = products.pad(x, (BLOCK,))
    scratch = {
        "planes": plgpu.SMEM((2, PLANE, STRIP), jnp.bfloat16),
        "ring": ring_barriers(SLOTS, num_copies=program.COMPUTE),
        **block_scratch(),
    }
    y = _call(_multiply_kernel, shuffle(x), w, group_sizes, w.shape[2], scratch, interpret)
    return y[:, :width]


def multiply_transposed(
    d_y: Float[Array, "A N"],
    w: Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    interpret: bool = False,
) -> Float[Array, "A K"]:
    """Returns d_y w[g]^T; arguments as in `multiply`."""
    width = w.shape[1]
    w = whole_blocks(w)
    d_y = products.pad(d_y, (STRIP,))
    scratch = {
        "words": plgpu.SMEM((SLOTS, PLANE, PLANE), jnp.int32),
        "scales": plgpu.SMEM((SLOTS, PLANE, PLANE), jnp.bfloat16),
        "planes": plgpu.SMEM((2, STRIP, PLANE), jnp.bfloat16),
        "ring": ring_barriers(SLOTS, num_copies=program.COMPUTE + _COPIES),
    }
    d_x = _call(_transposed_kernel, d_y, w, group_sizes, w.shape[1], scratch, interpret)
    return unshuffle(d_x)[:, :width]


def shuffle(x: Float[Array, "A K"]) -> Float[Array, "A K"]:
    """Brings each 512 columns from the order (g, j, i) into the order (i, j, g)."""
    return x.reshape(x.shape[0], -1, *_ORDER).transpose(0, 1, 4, 3, 2).reshape(x.shape)


def unshuffle(x: Float[Array, "A K"]) -> Float[Array, "A K"]:
    """Undoes `shuffle`."""
    return x.reshape(x.shape[0], -1, *_ORDER[::-1]).transpose(0, 1, 4, 3, 2).reshape(x.shape)


def plane(words: Int[Array, "R N"], scales: Float[Array, "R N"], nibble: Array | int) -> Array:
    """Returns the values of one nibble of each word, in bfloat16; scales are float32."""
    codes = ((words >> (4 * nibble)) & 15) - 8
    return (codes.astype(jnp.float32) * scales).astype(jnp.bfloat16)


def whole_blocks(w: Int4Weight) -> Int4Weight:
    """Fills w up to whole blocks with zeros, and repeats scales of larger groups; K2's need not."""
    if w.group_size % GROUP_SIZE:
        raise NotImplementedError(
            f"int4: 'pallas_gpu' takes scales of {GROUP_SIZE} weights or a multiple, got "
            f"{w.group_size}; choose 'xla' in compute.implementation"
        )
    scales = jnp.repeat(w.scales, w.group_size // GROUP_SIZE, axis=-2)
    return Int4Weight(
        codes=products.pad(w.codes, (PLANE, STRIP), ZERO_WORD),
        scales=products.pad(scales, (_GROUPS, STRIP)),
    )


def _call(kernel, x, w, group_sizes, num_columns, scratch, interpret):
    """Runs a kernel on rows, the matrices of their groups, and a result of so many columns."""
    num_rows = x.shape[0]
    tiles = products.cut(products.with_spare_rows(group_sizes, num_rows), num_rows)
    rows = (program.COMPUTE, program.ROWS)
    return program.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        scratch={
            "x_blocks": plgpu.SMEM((SLOTS, *rows, PLANE), x.dtype),
            "staged": plgpu.SMEM((*rows, STRIP), x.dtype),
            "ready": plgpu.Barrier(num_arrivals=program.COMPUTE),
            **scratch,
        },
        grid=products.grid(tiles.group.size * (num_columns // STRIP)),
        cost=cost(num_rows, w),
        interpret=interpret,
    )(*tiles, x, *arrays(w))


def arrays(w: Int4Weight) -> tuple[Array, Array]:
    """Returns the words as [E, K / 32, 4, N], and the scales."""
    num_groups, _, outputs = w.shape
    return w.codes.reshape(num_groups, -1, _WORDS, outputs), w.scales


def cost(num_rows: int, w: Int4Weight) -> pl.CostEstimate:
    """Returns the work of a product of so many rows in bfloat16."""
    _, inputs, outputs = w.shape
    return pl.CostEstimate(
        flops=2 * num_rows * inputs * outputs,
        bytes_accessed=2 * num_rows * (inputs + outputs) + 4 * w.codes.size + 2 * w.scales.size,
        transcendentals=0,
    )


class Memory(NamedTuple):
    """Operands and results of a kernel, in the device's memory."""

    tiles: Tiles | None  # none: all rows are one unit's
    x: Any
    words: Any  # [E, K / 32, 4, N]
    scales: Any  # [E, K / 32, N]
    y: Any

    def unit(self, number: Array) -> RowUnit:
        """Returns a tile of rows times a strip of columns."""
        columns, steps = (self.y.shape[1], STRIP), self.x.shape[1] // PLANE
        return products.row_unit(self.tiles, number, self.words.shape[0], columns, steps)

    def copy_rows(self, at: At, to: Any, barrier: Any) -> None:
        """Starts the copies of a unit's rows times the 64 inputs of a step."""
        products.copy_rows(self.x, at.unit.start, _step_columns(at), to, barrier)

    def copy_block(
        self, group: Array | int, block: Array, columns: Any, to: Any, barrier: Any
    ) -> None:
        """Starts the copies of a block of 512 inputs to its words and scales, [64, n] each."""
        words, scales = to
        groups = pl.ds(block * _GROUPS, _GROUPS)
        for j in range(_WORDS):
            rows = slice(j * _GROUPS, (j + 1) * _GROUPS)
            plgpu.copy_gmem_to_smem(
                self.words.at[group, groups, j, columns], words.at[rows], barrier
            )
            plgpu.copy_gmem_to_smem(
                self.scales.at[group, groups, columns], scales.at[rows], barrier
            )


class Blocks(NamedTuple):
    """A ring of words and scales, one of which serves eight steps."""

    words: Any  # [2, 64, 128]
    scales: Any  # [2, 64, 128]
    ring: Ring

    def fill(self, memory: Memory, at: At, block: Array) -> None:
        """Starts, at the first of eight steps, the copies of a block."""

        @pl.when(jax.lax.rem(at.step, CODES_PER_WORD) == 0)
        def _():
            slot = self.ring.await_free(jax.lax.div(at.done, CODES_PER_WORD))
            columns = pl.ds(at.unit.column, STRIP)
            to = self.words.at[slot], self.scales.at[slot]
            memory.copy_block(at.unit.group, block, columns, to, self.ring.full.at[slot])

    def take(self, done: Array, warpgroup: Array) -> tuple[Array, Array]:
        """Returns a warpgroup's 64 columns of words and scales, in registers."""
        columns = _half(warpgroup)

        def read(step, slot, state):
            return self.words[slot, :, columns], self.scales[slot, :, columns]

        words, scales = self.ring.use_one(jax.lax.div(done, CODES_PER_WORD), None, read)
        return words, scales.astype(jnp.float32)


def block_scratch() -> dict[str, Any]:
    """Describes the shared memory of `Blocks`."""
    return {
        "words": plgpu.SMEM((_BLOCK_SLOTS, PLANE, STRIP), jnp.int32),
        "scales": plgpu.SMEM((_BLOCK_SLOTS, PLANE, STRIP), jnp.bfloat16),
        "block_ring": ring_barriers(_BLOCK_SLOTS, num_copies=_COPIES),
    }


def _meet(ready: Any) -> None:
    """Waits until both warpgroups have written their half of a block.

    Before, each waits for its own products: two blocks later the half is written over, which both
    have then read.
    """
    plgpu.commit_smem()
    plgpu.wgmma_wait(0)
    meet(ready)


def _step_columns(at: At) -> Any:
    return pl.ds(at.step * PLANE, PLANE)


def _half(warpgroup: Array) -> Any:
    return pl.ds(pl.multiple_of(warpgroup * PLANE, PLANE), PLANE)


def _multiply_kernel(*refs, x_blocks, staged, ready, words, scales, planes, ring, block_ring):
    *plan, x, codes, scales_of, y = refs
    memory = Memory(Tiles(*plan), x, codes, scales_of, y)
    parts = _Forward(memory, x_blocks, Blocks(words, scales, block_ring), planes, staged, ready)
    products.run(memory.tiles.count[0] * (y.shape[1] // STRIP), ring, parts)


class _Forward(NamedTuple):
    """Each block of words serves eight blocks of rows; see `products.Parts`."""

    memory: Memory
    x_blocks: Any  # [slots, 2, 64, 64]
    blocks: Blocks
    planes: Any  # [2, 64, 128]
    staged: Any  # [2, 64, 128]
    ready: Any
    shape: tuple[int, int] = (program.ROWS, STRIP)
    unrolled: int = CODES_PER_WORD

    def unit(self, number):
        return self.memory.unit(number)

    def copies(self, at: At, barrier):
        self.memory.copy_rows(at, self.x_blocks.at[at.slot], barrier)
        self.blocks.fill(self.memory, at, jax.lax.div(at.step, CODES_PER_WORD))

    def begin(self, done, warpgroup):
        return self.blocks.take(done, warpgroup)

    def multiply(self, at: At, warpgroup, sums, state):
        to = jax.lax.rem(at.done, 2)
        self.planes[to, :, _half(warpgroup)] = plane(*state, at.part)
        _meet(self.ready)
        plgpu.wgmma(sums, self.x_blocks.at[at.slot, warpgroup], self.planes.at[to])

    def finish(self, unit, warpgroup, sums):
        to = (self.staged, self.memory.y)
        products.store_rows(self.memory.tiles, unit, warpgroup, sums, to)


def _transposed_kernel(*refs, x_blocks, staged, ready, words, scales, planes, ring):
    *plan, d_y, codes, scales_of, d_x = refs
    memory = Memory(Tiles(*plan), d_y, codes, scales_of, d_x)
    parts = _Transposed(memory, x_blocks, words, scales, planes, staged, ready)
    products.run(memory.tiles.count[0] * (d_x.shape[1] // STRIP), ring, parts)


class _Transposed(NamedTuple):
    """Each warpgroup dequantises one nibble of a block; see `products.Parts`."""

    memory: Memory
    x_blocks: Any  # [slots, 2, 64, 64]
    words: Any  # [slots, 64, 64]
    scales: Any  # [slots, 64, 64]
    planes: Any  # [2, 128, 64]
    staged: Any  # [2, 64, 128]
    ready: Any
    shape: tuple[int, int] = (program.ROWS, STRIP)
    unrolled: int = 1

    def unit(self, number):
        return self.memory.unit(number)

    def copies(self, at: At, barrier):
        self.memory.copy_rows(at, self.x_blocks.at[at.slot], barrier)
        self.memory.copy_block(
            at.unit.group,
            jax.lax.div(at.unit.column, BLOCK),
            _step_columns(at),
            (self.words.at[at.slot], self.scales.at[at.slot]),
            barrier,
        )

    def begin(self, done, warpgroup):
        return None

    def multiply(self, at: At, warpgroup, sums, state):
        nibble = jax.lax.rem(jax.lax.div(at.unit.column, PLANE), CODES_PER_WORD) + warpgroup
        scales = self.scales[at.slot].astype(jnp.float32)
        to = jax.lax.rem(at.done, 2)
        self.planes[to, _half(warpgroup)] = plane(self.words[at.slot], scales, nibble)
        _meet(self.ready)
        plgpu.wgmma(
            sums, self.x_blocks.at[at.slot, warpgroup], self.planes.at[to].transpose((1, 0))
        )

    def finish(self, unit, warpgroup, sums):
        to = (self.staged, self.memory.y)
        products.store_rows(self.memory.tiles, unit, warpgroup, sums, to)
