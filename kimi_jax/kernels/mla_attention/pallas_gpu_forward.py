"""Forward pass of attention on Hopper.

Grid: tiles of 128 queries, heads, sequences; the tiles with most keys start first. Two warpgroups
own 64 queries each and meet blocks of 128 keys, up to and with their own: tile i of queries reads
i + 1 blocks of keys, none above the diagonal. Only the last of them needs the causal mask; all need
the documents'. The logits of a block are two products, H and R wide, into one accumulator, so that
no H + R wide array exists.
Bytes moved: queries and outputs once; keys and values once for each tile of queries that sees them,
mostly from the cache.
Invariant: after a block, `Softmax` is that of all keys met so far.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.hopper import softmax as softmaxes
from kimi_jax.kernels.hopper.program import COMPUTE, ROWS, TILE
from kimi_jax.kernels.hopper.ring import copy_in, copy_out, ring_barriers
from kimi_jax.kernels.hopper.softmax import F32, LOG2_E
from kimi_jax.kernels.hopper.sums import Factors, Sum, multiply, zeros
from kimi_jax.kernels.mla_attention import pallas_gpu_blocks as blocks
from kimi_jax.kernels.mla_attention.pallas_gpu_blocks import Keys

_SLOTS = 2  # of the ring; three do not fit in shared memory


class _Own(NamedTuple):
    """Of each warpgroup, in shared memory; the output leaves through `nope`."""

    nope: Any  # [2, 64, H]
    rope: Any  # [2, 64, R]
    segments: Any  # [2, 64]
    largest: Any  # [2, 64]
    log_sum: Any  # [2, 64]
    arrived: Any  # [2]


def forward(
    q_nope: Array, q_rope: Array, keys: Keys, scale: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """Returns the output [B, T, N, U], and largest logits and logs of sums [B, N, T], float32."""
    batch, num_positions, num_heads, width = keys.value.shape
    nope, rope, dtype = q_nope.shape[3], q_rope.shape[3], q_nope.dtype
    column = jax.ShapeDtypeStruct((batch, num_heads, num_positions), F32)
    results = (jax.ShapeDtypeStruct(keys.value.shape, dtype), column, column)
    vectors = [plgpu.SMEM((COMPUTE, ROWS), x) for x in (jnp.int32, F32, F32)]
    own = _Own(
        plgpu.SMEM((COMPUTE, ROWS, nope), dtype),
        plgpu.SMEM((COMPUTE, ROWS, rope), dtype),
        *vectors,
        arrived=plgpu.Barrier(num_arrivals=3, num_barriers=COMPUTE),
    )
    ring = ring_barriers(_SLOTS, len(keys))
    run = program.kernel(
        functools.partial(_attend_tile, scale=scale, interpret=interpret),
        out_type=results,
        scratch=(own, blocks.shared_memory(keys, _SLOTS, TILE), ring),
        grid=blocks.grid(batch, num_heads, num_positions, TILE),
        cost=blocks.cost((q_nope, q_rope, keys), results, nope + rope + width),
        interpret=interpret,
    )
    return run(q_nope, q_rope, *keys)


def _attend_tile(*refs, scale: float, interpret: bool) -> None:
    q_nope, q_rope, arrays, (out, largest, log_sum) = *refs[:2], Keys(*refs[2:6]), refs[6:9]
    own_of_all, key_blocks, ring = refs[9:]
    tile, head, sequence = blocks.axes()
    tile = out.shape[1] // TILE - 1 - tile

    def copy():
        ring.fill(
            tile + 1,
            lambda step, slot, barrier: copy_in(
                arrays.at(sequence, head, pl.ds(step * TILE, TILE)),
                blocks.pick(key_blocks, slot),
                barrier,
            ),
        )

    def compute(warpgroup):
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        here, heads_here = (sequence, rows), (sequence, rows, head)
        own = blocks.pick(own_of_all, warpgroup)
        sources = (q_nope.at[heads_here], q_rope.at[heads_here], arrays.segments.at[here])
        copy_in(sources, own[:3], own.arrived)
        plgpu.barrier_wait(own.arrived)

        def visit(step, slot, softmax, diagonal):
            pairs = blocks.Pairs(start - step * TILE, True, diagonal)
            return _visit(own, blocks.pick(key_blocks, slot), softmax, pairs, scale, interpret)

        softmax = softmaxes.empty_softmax(out.shape[3])
        softmax = ring.use(0, tile, softmax, functools.partial(visit, diagonal=False))
        softmax = ring.use_one(tile, softmax, functools.partial(visit, diagonal=True))
        results = _store(own, softmax)
        columns = (x.at[sequence, head, rows] for x in (largest, log_sum))
        copy_out(results, (out.at[heads_here], *columns))

    program.specialise(compute, copy)


def _visit(own, keys, softmax, pairs, scale, interpret):
    """Meets the queries of a warpgroup with a block of keys."""
    products = [Factors(own.nope, keys.nope, True), Factors(own.rope, keys.rope, True)]
    (logits,) = multiply([Sum(products, zeros(ROWS, TILE))], interpret)
    logits = pairs.mask(logits * (scale * LOG2_E), own.segments[...], keys.segments[...])
    softmax, exponentials = softmaxes.add_logits(softmax, logits)
    product = Factors(exponentials.astype(keys.value.dtype), keys.value)
    (weighted,) = multiply([Sum([product], softmax.weighted)], interpret)
    return softmax._replace(weighted=weighted)


def _store(own: _Own, softmax: softmaxes.Softmax) -> tuple[Any, Any, Any]:
    """Writes output, largest logit and log of the sum to shared memory, and returns where."""
    inverse = softmaxes.along_rows(1.0 / softmax.total, softmax.weighted.shape)
    own.nope[...] = (softmax.weighted * inverse).astype(own.nope.dtype)
    largest = softmax.largest / LOG2_E
    own.largest[...] = largest
    own.log_sum[...] = largest + jnp.log(softmax.total)
    return own.nope, own.largest, own.log_sum
