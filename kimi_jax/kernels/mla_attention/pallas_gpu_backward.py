"""Backward pass of attention on Hopper, in two kernels; no sum is shared by thread blocks.

Probabilities are computed again, from the kept logarithm of each softmax's sum.
`_query_gradients`: grid and warpgroups as in the forward pass, blocks of 64 keys; gradients of 64
queries stay in registers.
`_key_gradients`: tiles of 64 keys, which meet blocks of 64 queries, from the last to their own.
Gradients of both parts of the keys and of the values do not fit in one warpgroup's registers: one
computes probabilities and the values' gradient, the other that of the keys (H + R + U products of a
pair each, if U = H); the first sends its probabilities, in bfloat16. Logits are transposed (rows
are keys), so that each product's left factor is in registers or lies in shared memory as it is.
The gradient of the rotary key, which all heads share, leaves by head in float32 and is summed
outside: 4 B N T R bytes, written and read once.
Bytes moved, the cache aside: own operands and gradients once, the others once per tile.
Invariant: no gradient is rounded before it is complete; the scale is applied last.
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
from kimi_jax.kernels.hopper.ring import Ring, copy_in, copy_out, exchange_barriers, ring_barriers
from kimi_jax.kernels.hopper.softmax import F32, LOG2_E
from kimi_jax.kernels.hopper.sums import Factors, Sum, multiply, zeros
from kimi_jax.kernels.mla_attention import pallas_gpu_blocks as blocks
from kimi_jax.kernels.mla_attention.pallas_gpu_blocks import Keys, Queries

_SLOTS = 3  # of the ring
_SLOTS_OF_EXCHANGE = 2


def backward(
    queries: Queries, keys: Keys, scale: float, interpret: bool
) -> tuple[Array, Array, Array, Array, Array]:
    """Returns the gradients of q_nope, q_rope, k_nope, k_rope and value, k_rope's in float32."""
    d_q_nope, d_q_rope = _query_gradients(queries, keys, scale, interpret)
    d_k_nope, d_k_rope, d_value = _key_gradients(queries, keys, scale, interpret)
    return d_q_nope, d_q_rope, d_k_nope, jnp.sum(d_k_rope, axis=1), d_value


def _query_gradients(queries: Queries, keys: Keys, scale: float, interpret: bool) -> Any:
    batch, num_positions, num_heads, nope = queries.nope.shape
    rope, width = queries.rope.shape[3], keys.value.shape[3]
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in queries[:2])
    arrived = plgpu.Barrier(num_arrivals=len(queries), num_barriers=COMPUTE)
    scratch = (
        blocks.shared_memory(queries, COMPUTE, ROWS),
        arrived,
        blocks.shared_memory(keys, _SLOTS, ROWS),
        ring_barriers(_SLOTS, len(keys)),
    )
    run = program.kernel(
        functools.partial(_query_tile, scale=scale, interpret=interpret),
        out_type=results,
        scratch=scratch,
        grid=blocks.grid(batch, num_heads, num_positions, TILE),
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
            lambda step, slot, barrier: copy_in(
                key_arrays.at(sequence, head, pl.ds(step * ROWS, ROWS)),
                blocks.pick(key_blocks, slot),
                barrier,
            ),
        )

    def compute(warpgroup):
        start = tile * TILE + warpgroup * ROWS
        rows = pl.ds(start, ROWS)
        own = blocks.pick(own_of_all, warpgroup)
        copy_in(arrays.at(sequence, head, rows), own, arrived.at[warpgroup])
        plgpu.barrier_wait(arrived.at[warpgroup])

        def visit(step, slot, sums, crosses):
            pairs = blocks.Pairs(start - step * ROWS, True, crosses)
            return _add_keys(own, blocks.pick(key_blocks, slot), sums, pairs, scale, interpret)

        sums = tuple(zeros(ROWS, ref.shape[1]) for ref in own[:2])
        sums = ring.use(0, first_crossing, sums, functools.partial(visit, crosses=False))
        sums = ring.use(first_crossing, num_steps, sums, functools.partial(visit, crosses=True))
        for ref, total in zip(own[:2], sums, strict=True):
            ref[...] = (scale * total).astype(ref.dtype)
        copy_out(own[:2], [x.at[sequence, rows, head] for x in results])

    program.specialise(compute, copy)


def _add_keys(own, keys, sums, pairs, scale, interpret):
    """Adds a block of keys to the gradients of a warpgroup's queries."""
    shape = (ROWS, ROWS)
    logits, d_probabilities = multiply(
        [
            Sum(
                [Factors(own.nope, keys.nope, True), Factors(own.rope, keys.rope, True)],
                zeros(*shape),
            ),
            Sum([Factors(own.d_out, keys.value, True)], zeros(*shape)),
        ],
        interpret,
    )
    logits = pairs.mask(logits * (scale * LOG2_E), own.segments[...], keys.segments[...])
    log_sum, inner = (softmaxes.along_rows(x[...], shape) for x in (own.log_sum, own.inner))
    d_logits = jnp.exp2(logits - log_sum) * (d_probabilities - inner)
    d_logits = d_logits.astype(keys.nope.dtype)
    return multiply(
        [
            Sum([Factors(d_logits, keys.nope)], sums[0]),
            Sum([Factors(d_logits, keys.rope)], sums[1]),
        ],
        interpret,
    )


class _Shared(NamedTuple):
    """What the thread block of 64 keys keeps in shared memory."""

    own: Keys  # [64, ...]
    own_arrived: Any
    probabilities: Any  # [slots, 64 keys, 64 queries], from the first warpgroup to the second
    exchange: Ring
    d_rope: Any  # [64, R], float32
    queries: Queries  # [slots, 64, ...]
    ring: Ring


def _key_gradients(queries: Queries, keys: Keys, scale: float, interpret: bool) -> Any:
    batch, num_positions, num_heads, nope = queries.nope.shape
    rope, width, dtype = queries.rope.shape[3], keys.value.shape[3], keys.nope.dtype
    results = (
        jax.ShapeDtypeStruct(keys.nope.shape, dtype),
        jax.ShapeDtypeStruct((batch, num_heads, num_positions, rope), F32),
        jax.ShapeDtypeStruct(keys.value.shape, dtype),
    )
    scratch = _Shared(
        own=blocks.shared_memory(keys, ROWS),
        own_arrived=plgpu.Barrier(num_arrivals=len(keys)),
        probabilities=plgpu.SMEM((_SLOTS_OF_EXCHANGE, ROWS, ROWS), dtype),
        exchange=exchange_barriers(_SLOTS_OF_EXCHANGE),
        d_rope=plgpu.SMEM((ROWS, rope), F32),
        queries=blocks.shared_memory(queries, _SLOTS, ROWS),
        ring=ring_barriers(_SLOTS, len(queries)),
    )
    run = program.kernel(
        functools.partial(_key_tile, scale=scale, interpret=interpret),
        out_type=results,
        scratch=scratch,
        grid=blocks.grid(batch, num_heads, num_positions, ROWS),
        cost=blocks.cost((*queries, *keys), results, 2 * (nope + rope + width)),
        interpret=interpret,
    )
    return run(*queries, *keys)


def _key_tile(*refs, scale: float, interpret: bool) -> None:
    arrays, key_arrays, results = Queries(*refs[:6]), Keys(*refs[6:10]), refs[10:13]
    shared = _Shared(*refs[13:])
    tile, head, sequence = blocks.axes()
    num_steps = key_arrays.nope.shape[1] // ROWS - tile
    rows = pl.ds(tile * ROWS, ROWS)
    own, arrived = shared.own, shared.own_arrived

    def copy():
        copy_in(key_arrays.at(sequence, head, rows), own, arrived)
        shared.ring.fill(
            num_steps,
            lambda step, slot, barrier: copy_in(
                arrays.at(sequence, head, pl.ds((tile + num_steps - 1 - step) * ROWS, ROWS)),
                blocks.pick(shared.queries, slot),
                barrier,
            ),
        )

    def compute(warpgroup):
        plgpu.barrier_wait(arrived)

        @pl.when(warpgroup == 0)
        def _():
            d_value = _gradient_of_values(own, shared, num_steps, scale, interpret)
            # The other warpgroup reads the values until then.
            shared.exchange.await_receipt(num_steps - 1)
            own.value[...] = d_value.astype(own.value.dtype)
            copy_out((own.value,), (results[2].at[sequence, rows, head],))

        @pl.when(warpgroup == 1)
        def _():
            d_nope, d_rope = _gradients_of_keys(own, shared, num_steps, interpret)
            own.nope[...] = (scale * d_nope).astype(own.nope.dtype)
            shared.d_rope[...] = scale * d_rope
            targets = results[0].at[sequence, rows, head], results[1].at[sequence, head, rows]
            copy_out((own.nope, shared.d_rope), targets)

    program.specialise(compute, copy)


def _gradient_of_values(own, shared: _Shared, num_steps, scale, interpret):
    """Computes probabilities, sends them to the other warpgroup, and multiplies them by d_out."""

    def visit(step, slot, d_value, crosses):
        queries = blocks.pick(shared.queries, slot)
        products = [Factors(own.nope, queries.nope, True), Factors(own.rope, queries.rope, True)]
        (logits,) = multiply([Sum(products, zeros(ROWS, ROWS))], interpret)
        pairs = blocks.Pairs(jnp.int32(0), rows_are_queries=False, crosses_diagonal=crosses)
        logits = pairs.mask(logits * (scale * LOG2_E), own.segments[...], queries.segments[...])
        log_sum = softmaxes.along_columns(queries.log_sum[...], logits.shape)
        probabilities = jnp.exp2(logits - log_sum).astype(own.value.dtype)
        shared.exchange.send(step, shared.probabilities, probabilities)
        product = Factors(probabilities, queries.d_out)
        return multiply([Sum([product], d_value)], interpret)[0]

    d_value = zeros(ROWS, own.value.shape[1])
    last = num_steps - 1
    d_value = shared.ring.use(0, last, d_value, functools.partial(visit, crosses=False))
    return shared.ring.use_one(last, d_value, functools.partial(visit, crosses=True))


def _gradients_of_keys(own, shared: _Shared, num_steps, interpret):
    """Returns the gradients of both parts of the keys, without the scale."""

    def visit(step, slot, sums):
        queries = blocks.pick(shared.queries, slot)
        product = Factors(own.value, queries.d_out, True)
        (d_probabilities,) = multiply([Sum([product], zeros(ROWS, ROWS))], interpret)
        inner = softmaxes.along_columns(queries.inner[...], d_probabilities.shape)
        probabilities = shared.exchange.receive(step, shared.probabilities).astype(F32)
        d_logits = (probabilities * (d_probabilities - inner)).astype(own.nope.dtype)
        factors = Factors(d_logits, queries.nope), Factors(d_logits, queries.rope)
        return multiply([Sum([f], s) for f, s in zip(factors, sums, strict=True)], interpret)

    sums = zeros(ROWS, own.nope.shape[1]), zeros(ROWS, own.rope.shape[1])
    return shared.ring.use(0, num_steps, sums, visit)
