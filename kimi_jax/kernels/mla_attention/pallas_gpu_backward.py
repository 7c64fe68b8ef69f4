"""Backward pass of attention on Hopper, in two kernels; no sum is shared by thread blocks.

Probabilities are computed again, from the kept logarithm of each softmax's sum.
`_query_gradients`: grid and warpgroups as in the forward pass, blocks of 64 keys; gradients of 64
queries stay in registers.
`_key_gradients`: tiles of 128 keys; two warpgroups own 64 keys each and meet blocks of 64 queries,
from the first that sees the tile on. Logits are transposed (rows are keys), so that each product's
left factor is in registers or in shared memory as it lies there. The gradient of the rotary key,
which all heads share, leaves by head in float32 and is summed outside: 4 B N T R bytes, written and
read once.
Bytes moved, the cache aside: the own operands and gradients once, the others once per tile.
Invariant: no gradient is rounded before it is complete; the scale is applied last.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kimi_jax.kernels import hopper
from kimi_jax.kernels.hopper import COMPUTE, ROWS, Factors, Sum
from kimi_jax.kernels.mla_attention import pallas_gpu_blocks as blocks
from kimi_jax.kernels.mla_attention.pallas_gpu_blocks import F32, LOG2_E, TILE, Keys, Queries

_SLOTS_OF_KEYS = 3
_SLOTS_OF_QUERIES = 2  # three do not fit in shared memory


def backward(
    queries: Queries, keys: Keys, scale: float, interpret: bool
) -> tuple[Array, Array, Array, Array, Array]:
    """Returns the gradients of q_nope, q_rope, k_nope, k_rope and value, k_rope's in float32."""
    d_q_nope, d_q_rope = _query_gradients(queries, keys, scale, interpret)
    d_k_nope, d_k_rope, d_value = _key_gradients(queries, keys, scale, interpret)
    return d_q_nope, d_q_rope, d_k_nope, jnp.sum(d_k_rope, axis=1), d_value


class _Weights(NamedTuple):
    """Of a block of pairs, ready for products."""

    probabilities: Array
    d_logits: Array  # without the scale


def _weights(logits: Array, d_probabilities: Array, log_sum: Array, inner: Array) -> _Weights:
    probabilities = jnp.exp2(logits - log_sum)
    return _Weights(probabilities, probabilities * (d_probabilities - inner))


def _query_gradients(queries: Queries, keys: Keys, scale: float, interpret: bool) -> Any:
    batch, num_positions, num_heads, nope = queries.nope.shape
    rope, width = queries.rope.shape[3], keys.value.shape[3]
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in queries[:2])
    arrived = plgpu.Barrier(num_arrivals=len(queries), num_barriers=COMPUTE)
    scratch = (
        blocks.shared_memory(queries, COMPUTE, ROWS),
        arrived,
        blocks.shared_memory(keys, _SLOTS_OF_KEYS, ROWS),
        hopper.ring_barriers(_SLOTS_OF_KEYS, len(keys)),
    )
    run = hopper.kernel(
        functools.partial(_query_tile, scale=scale, interpret=interpret),
        out_type=results,
        scratch=scratch,
        grid=blocks.grid(batch, num_heads, num_positions),
        cost=blocks.cost((*queries, *keys), results, 2 * (nope + rope) + width),
        interpret=interpret,
    )
    return run(*queries, *keys)


def _query_tile(*refs, scale: float, interpret: bool) -> None:
    arrays, key_arrays, results = Queries(*refs[:6]), Keys(*refs[6:10]), refs[10:12]
    own_of_all, arrived, key_blocks, ring = refs[12:]
    tile, head, sequence = blocks.axes()
    tile = arrays.nope.shape[1] // TILE - 1 - tile
    first_crossing, num_steps = COMPUTE * tile, COMPUTE * (tile + 1)

    def copy():
        ring.fill(
            num_steps,
            lambda step, slot, barrier: hopper.copy_in(
                key_arrays.at(sequence, head, pl.ds(step * ROWS, ROWS)),
                blocks.pick(key_blocks, slot),
                barrier,
            ),
        )

    def compute(warpgroup):
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        own = blocks.pick(own_of_all, warpgroup)
        hopper.copy_in(arrays.at(sequence, head, rows), own, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])

        def visit(step, slot, sums, crosses):
            pairs = blocks.Pairs(start, step * ROWS, True, crosses)
            return _add_keys(own, blocks.pick(key_blocks, slot), sums, pairs, scale, interpret)

        sums = tuple(hopper.zeros(ROWS, ref.shape[1]) for ref in own[:2])
        sums = ring.use(0, first_crossing, sums, functools.partial(visit, crosses=False))
        sums = ring.use(first_crossing, num_steps, sums, functools.partial(visit, crosses=True))
        for ref, total in zip(own[:2], sums, strict=True):
            ref[...] = (scale * total).astype(ref.dtype)
        hopper.copy_out(own[:2], [x.at[sequence, rows, head] for x in results])

    hopper.specialise(compute, copy)


def _add_keys(own, keys, sums, pairs, scale, interpret):
    """Adds a block of keys to the gradients of a warpgroup's queries."""
    shape = (ROWS, ROWS)
    logits, d_probabilities = hopper.multiply(
        [
            Sum(
                [Factors(own.nope, keys.nope, True), Factors(own.rope, keys.rope, True)],
                hopper.zeros(*shape),
            ),
            Sum([Factors(own.d_out, keys.value, True)], hopper.zeros(*shape)),
        ],
        interpret,
    )
    logits = pairs.mask(logits * (scale * LOG2_E), own.segments[...], keys.segments[...])
    log_sum, inner = (blocks.along_rows(x[...], shape) for x in (own.log_sum, own.inner))
    d_logits = _weights(logits, d_probabilities, log_sum, inner).d_logits
    d_logits = d_logits.astype(keys.nope.dtype)
    return hopper.multiply(
        [
            Sum([Factors(d_logits, keys.nope)], sums[0]),
            Sum([Factors(d_logits, keys.rope)], sums[1]),
        ],
        interpret,
    )


def _key_gradients(queries: Queries, keys: Keys, scale: float, interpret: bool) -> Any:
    batch, num_positions, num_heads, nope = queries.nope.shape
    rope, width = queries.rope.shape[3], keys.value.shape[3]
    results = (
        jax.ShapeDtypeStruct(keys.nope.shape, keys.nope.dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_positions, rope), F32),
        jax.ShapeDtypeStruct(keys.value.shape, keys.value.dtype),
    )
    scratch = (
        blocks.shared_memory(keys, COMPUTE, ROWS),
        plgpu.Barrier(num_arrivals=len(keys), num_barriers=COMPUTE),
        plgpu.SMEM((COMPUTE, ROWS, rope), F32),
        blocks.shared_memory(queries, _SLOTS_OF_QUERIES, ROWS),
        hopper.ring_barriers(_SLOTS_OF_QUERIES, len(queries)),
    )
    run = hopper.kernel(
        functools.partial(_key_tile, scale=scale, interpret=interpret),
        out_type=results,
        scratch=scratch,
        grid=blocks.grid(batch, num_heads, num_positions),
        cost=blocks.cost((*queries, *keys), results, 2 * (nope + rope + width)),
        interpret=interpret,
    )
    return run(*queries, *keys)


def _key_tile(*refs, scale: float, interpret: bool) -> None:
    query_arrays, arrays = Queries(*refs[:6]), Keys(*refs[6:10])
    d_nope, d_rope, d_value = refs[10:13]
    own_of_all, arrived, rope_out, query_blocks, ring = refs[13:]
    tile, head, sequence = blocks.axes()
    num_steps = arrays.nope.shape[1] // ROWS - COMPUTE * tile

    def copy():
        ring.fill(
            num_steps,
            lambda step, slot, barrier: hopper.copy_in(
                query_arrays.at(sequence, head, pl.ds(tile * TILE + step * ROWS, ROWS)),
                blocks.pick(query_blocks, slot),
                barrier,
            ),
        )

    def compute(warpgroup):
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        own = blocks.pick(own_of_all, warpgroup)
        hopper.copy_in(arrays.at(sequence, head, rows), own, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])

        def visit(step, slot, sums, crosses):
            pairs = blocks.Pairs(start, tile * TILE + step * ROWS, False, crosses)
            return _add_queries(own, blocks.pick(query_blocks, slot), sums, pairs, scale, interpret)

        sums = tuple(hopper.zeros(ROWS, ref.shape[1]) for ref in own[:3])
        sums = ring.use(0, COMPUTE, sums, functools.partial(visit, crosses=True))
        sums = ring.use(COMPUTE, num_steps, sums, functools.partial(visit, crosses=False))
        rope = rope_out.at[warpgroup]
        own.nope[...] = (scale * sums[0]).astype(own.nope.dtype)
        rope[...] = scale * sums[1]
        own.value[...] = sums[2].astype(own.value.dtype)
        targets = [x.at[sequence, rows, head] for x in (d_nope, d_value)]
        hopper.copy_out((own.nope, own.value), targets)
        hopper.copy_out((rope,), (d_rope.at[sequence, head, rows],))

    hopper.specialise(compute, copy)


def _add_queries(own, queries, sums, pairs, scale, interpret):
    """Adds a block of queries to the gradients of a warpgroup's keys and values."""
    shape, dtype = (ROWS, ROWS), own.nope.dtype
    logits, d_probabilities = hopper.multiply(
        [
            Sum(
                [Factors(own.nope, queries.nope, True), Factors(own.rope, queries.rope, True)],
                hopper.zeros(*shape),
            ),
            Sum([Factors(own.value, queries.d_out, True)], hopper.zeros(*shape)),
        ],
        interpret,
    )
    logits = pairs.mask(logits * (scale * LOG2_E), own.segments[...], queries.segments[...])
    log_sum, inner = (blocks.along_columns(x[...], shape) for x in (queries.log_sum, queries.inner))
    weights = _weights(logits, d_probabilities, log_sum, inner)
    d_logits = weights.d_logits.astype(dtype)
    return hopper.multiply(
        [
            Sum([Factors(d_logits, queries.nope)], sums[0]),
            Sum([Factors(d_logits, queries.rope)], sums[1]),
            Sum([Factors(weights.probabilities.astype(dtype), queries.d_out)], sums[2]),
        ],
        interpret,
    )
