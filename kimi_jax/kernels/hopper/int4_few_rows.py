"""Few rows times a matrix of four bits on Hopper GPUs, y^T = w^T x^T.

Compiled for an H100 and interpreted on a CPU; never timed.

The tensor cores' 64 rows are the matrix's columns here, so that 8 rows of x cost 8. Order of the
words, and how they are dequantised: `hopper/int4_products.py`.

* Grid: a unit is 128 columns times part of the inputs, so many parts that all multiprocessors have
  one; XLA adds them up.
* Blocks: the rows times 64 inputs, and 64 x 128 words and scales for eight of them.
* Bytes: 4.5 bits for a weight, once.
* Invariant: each value is dequantised once. A warpgroup dequantises what it multiplies itself, so
  that neither waits for the other.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kimi_jax.kernels.hopper import int4_products, products, program
from kimi_jax.kernels.hopper.int4_products import BLOCK, PLANE, SLOTS, STRIP, Blocks, Memory
from kimi_jax.kernels.hopper.products import At
from kimi_jax.kernels.hopper.ring import ring_barriers
from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight

MOST_ROWS = 64
_ROWS = 8  # fewest of a product


def multiply(
    x: Float[Array, "W K"], w: Int4Weight, *, interpret: bool = False
) -> Float[Array, "W N"]:
    """Returns x w for at most `MOST_ROWS` rows.

    Args:
      x: rows, in bfloat16.
      w: one matrix, [1, K, N].
      interpret: runs on any platform, slowly.
    """
    (num_rows, _), width = x.shape, w.shape[2]
    w = int4_products.whole_blocks(w)

    rows = int4_products.shuffle(products.pad(x, (_ROWS, BLOCK)))
    blocks, strips = w.shape[1] // BLOCK, w.shape[2] // STRIP
    blocks_of_part = -(-blocks * strips // program.MULTIPROCESSORS)
    parts = -(-blocks // blocks_of_part)
    shape = (parts, w.shape[2], rows.shape[0])
    y = program.kernel(
        functools.partial(_kernel, blocks_of_part=blocks_of_part),
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch={
            "x_blocks": plgpu.SMEM((SLOTS, rows.shape[0], PLANE), x.dtype),
            "planes": plgpu.SMEM((2, program.COMPUTE, PLANE, PLANE), x.dtype),
            "staged": plgpu.SMEM((program.COMPUTE, PLANE, rows.shape[0]), jnp.float32),
            "ring": ring_barriers(SLOTS, num_copies=1),
            **int4_products.block_scratch(),
        },
        grid=products.grid(parts * strips),
        cost=int4_products.cost(num_rows, w),
        interpret=interpret,
    )(rows, *int4_products.arrays(w))
    return jnp.sum(y, axis=0).astype(x.dtype).T[:num_rows, :width]


def _kernel(*refs, x_blocks, planes, staged, ring, words, scales, block_ring, blocks_of_part):
    x, codes, scales_of, y = refs
    memory = Memory(None, x, codes, scales_of, y)
    blocks = Blocks(words, scales, block_ring)
    shape = (PLANE, x.shape[0])
    parts = _FewRows(memory, x_blocks, blocks, planes, staged, blocks_of_part, shape)
    products.run(y.shape[0] * (y.shape[1] // STRIP), ring, parts)


class _Unit(NamedTuple):
    """128 columns times part of the inputs."""

    steps: Array
    group: int
    first_block: Array
    part: Array
    column: Array


class _FewRows(NamedTuple):
    """See `products.Parts`."""

    memory: Memory
    x_blocks: Any  # [slots, rows, 64]
    blocks: Blocks
    planes: Any  # [2, 2, 64, 64]
    staged: Any  # [2, 64, rows], float32
    blocks_of_part: int
    shape: tuple[int, int]
    unrolled: int = CODES_PER_WORD

    def unit(self, number):
        strips = self.memory.y.shape[1] // STRIP
        part = jax.lax.div(number, strips)
        first_block = part * self.blocks_of_part
        blocks = jnp.minimum(self.blocks_of_part, self.memory.x.shape[1] // BLOCK - first_block)
        return _Unit(
            steps=blocks * CODES_PER_WORD,
            group=0,
            first_block=first_block,
            part=part,
            column=jax.lax.rem(number, strips) * STRIP,
        )

    def copies(self, at: At, barrier):
        step = at.unit.first_block * CODES_PER_WORD + at.step
        columns = pl.ds(step * PLANE, PLANE)
        plgpu.copy_gmem_to_smem(self.memory.x.at[:, columns], self.x_blocks.at[at.slot], barrier)
        self.blocks.fill(self.memory, at, jax.lax.div(step, CODES_PER_WORD))

    def begin(self, done, warpgroup):
        return self.blocks.take(done, warpgroup)

    def multiply(self, at: At, warpgroup, sums, state):
        plane = self.planes.at[jax.lax.rem(at.done, 2), warpgroup]
        plane[...] = int4_products.plane(*state, at.part)
        plgpu.commit_smem()
        plgpu.wgmma(sums, plane.transpose((1, 0)), self.x_blocks.at[at.slot].transpose((1, 0)))

    def finish(self, unit: _Unit, warpgroup, sums):
        rows = products.Rows(
            start=unit.column + warpgroup * PLANE, first=jnp.int32(0), size=jnp.int32(PLANE)
        )
        y = self.memory.y.at[unit.part]
        products.store(sums, self.staged.at[warpgroup], y, rows, 0)
