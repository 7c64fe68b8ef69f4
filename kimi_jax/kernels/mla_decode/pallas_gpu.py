"""Decoding with absorbed projections on Hopper GPUs, in Mosaic GPU.

Grid: splits of the sequence (fastest), blocks of 64 heads, sequences. A thread block reads the
blocks of 64 positions of its split once, as keys (latents and rotated keys, two products into one
accumulator) and as values (the latents again, from the same shared memory). 64 heads are the rows
of the products. The accumulated output is 64 x C in float32, more than one warpgroup has registers
for: two own half of the columns each, and both compute all logits, which costs
(2 (C + R) + C) / (2 C + R) = 1.5 times the products: still fewer per byte than the chip does.
Splits of a sequence differ by at most one block; what lies behind its length is not read, but for
the rest of the last block, which is masked. Partial outputs leave in the operands' dtype and are
put together outside, weighted by their sums.
Bytes moved: the used part of the cache once for each 64 heads, and 2 B N C bytes for each split.
Invariant: after a block, `Softmax` is that of all positions of the split so far.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.hopper import softmax as softmaxes
from kimi_jax.kernels.hopper.program import COMPUTE, ROWS
from kimi_jax.kernels.hopper.ring import Ring, copy_in, copy_out, keep_rows, meet, ring_barriers
from kimi_jax.kernels.hopper.softmax import F32, LOG2_E, MASKED
from kimi_jax.kernels.hopper.sums import Factors, Sum, multiply, zeros

_BLOCK = 64  # positions
_SLOTS = 2  # of the ring
_COLUMNS = 64  # that a swizzled block has; a multiple of it may be wide
_MOST_LATENTS = 512
_LEAST = 1e-30  # of a sum; that of a split without positions is zero


class _Scratch(NamedTuple):
    """Shared memory."""

    q_latent: Any  # [2, 64, C/2], by warpgroup; the output leaves through it
    q_rope: Any  # [64, R]
    q_arrived: Any
    latents: Any  # [slots, 2, 64, C/2]
    k_rope: Any  # [slots, 64, R]
    ring: Ring
    log_sum: Any  # [64]
    met: Any  # where the warpgroups that calculate wait for each other


def mla_decode(
    q_latent: Float[Array, "B N C"],
    q_rope: Float[Array, "B N R"],
    latents: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B N C"]:
    """Computes what the package's `mla_decode` describes, in bfloat16 on a Hopper GPU.

    Raises:
      NotImplementedError: another GPU, another dtype, or widths that the blocks do not fit.
    """
    program.require("mla_decode", q_latent.dtype, interpret)
    _check_widths(latents.shape[2], k_rope.shape[2])
    batch, num_heads, _ = q_latent.shape
    padding = -num_heads % ROWS
    q_latent, q_rope = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q_latent, q_rope))
    head_blocks, num_blocks = (num_heads + padding) // ROWS, -(-latents.shape[1] // _BLOCK)
    latents, k_rope = (
        jnp.pad(x, ((0, 0), (0, max(0, _BLOCK - x.shape[1])), (0, 0))) for x in (latents, k_rope)
    )
    num_splits = max(1, min(num_blocks, program.MULTIPROCESSORS // (batch * head_blocks)))
    operands = (q_latent, q_rope, latents, k_rope, lengths.astype(jnp.int32))
    parts, log_sums = _decode_splits(operands, num_splits, scale, interpret)
    weights = jax.nn.softmax(log_sums, axis=1)
    out = jnp.einsum("bpn,bpnc->bnc", weights, parts, preferred_element_type=F32)
    return out[:, :num_heads].astype(latents.dtype)


def _check_widths(latent: int, rope: int) -> None:
    if latent % (COMPUTE * _COLUMNS) or latent > _MOST_LATENTS or rope != _COLUMNS:
        raise NotImplementedError(
            f"mla_decode: 'pallas_gpu' takes latents of a multiple of {COMPUTE * _COLUMNS} "
            f"columns, at most {_MOST_LATENTS}, and rotated keys of {_COLUMNS}; got {latent} and "
            f"{rope}; choose 'auto' in compute.implementation"
        )


def _decode_splits(
    operands: tuple[Array, ...], num_splits: int, scale: float, interpret: bool
) -> tuple[Array, Array]:
    """Returns outputs [B, splits, N, C] and logs of sums [B, splits, N] of each split alone."""
    q_latent, q_rope, latents, k_rope, _ = operands
    (batch, num_heads, width), rope, dtype = q_latent.shape, q_rope.shape[2], q_latent.dtype
    results = (
        jax.ShapeDtypeStruct((batch, num_splits, num_heads, width), dtype),
        jax.ShapeDtypeStruct((batch, num_splits, num_heads), F32),
    )
    scratch = _Scratch(
        q_latent=plgpu.SMEM((COMPUTE, ROWS, width // COMPUTE), dtype),
        q_rope=plgpu.SMEM((ROWS, rope), dtype),
        q_arrived=plgpu.Barrier(num_arrivals=COMPUTE + 1),
        latents=plgpu.SMEM((_SLOTS, COMPUTE, _BLOCK, width // COMPUTE), dtype),
        k_rope=plgpu.SMEM((_SLOTS, _BLOCK, rope), dtype),
        ring=ring_barriers(_SLOTS, num_copies=COMPUTE + 1),
        log_sum=plgpu.SMEM((ROWS,), F32),
        met=plgpu.Barrier(num_arrivals=COMPUTE),
    )
    pairs = batch * num_heads * latents.shape[1]
    run = program.kernel(
        functools.partial(_decode_split, num_splits=num_splits, scale=scale, interpret=interpret),
        out_type=results,
        scratch=scratch,
        grid={"split": num_splits, "heads": num_heads // ROWS, "sequence": batch},
        cost=pl.CostEstimate(
            flops=2 * pairs * (2 * width + rope),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *results)),
            transcendentals=pairs,
        ),
        interpret=interpret,
    )
    return run(*operands)


class _Place(NamedTuple):
    """What a thread block decodes."""

    sequence: Array
    split: Array
    heads: Any  # 64 of them
    length: Array  # of the sequence
    first: Array  # block of the split
    num_steps: Array  # blocks of the split


def _place(lengths: Any, num_splits: int) -> _Place:
    split, sequence = jax.lax.axis_index("split"), jax.lax.axis_index("sequence")
    length = lengths[sequence]
    num_blocks = jax.lax.div(length + (_BLOCK - 1), _BLOCK)
    first, end = (jax.lax.div((split + i) * num_blocks, num_splits) for i in (0, 1))
    heads = pl.ds(jax.lax.axis_index("heads") * ROWS, ROWS)
    return _Place(sequence, split, heads, length, first, end - first)


def _decode_split(*refs, num_splits: int, scale: float, interpret: bool) -> None:
    *arrays, lengths, out, log_sum = refs[:7]
    scratch = _Scratch(*refs[7:])
    place = _place(lengths, num_splits)
    width = out.shape[3] // COMPUTE
    target = (place.sequence, place.split, place.heads)

    def compute(warpgroup):
        plgpu.barrier_wait(scratch.q_arrived)

        def visit(step, slot, softmax, is_last):
            used = place.length - (place.first + step) * _BLOCK if is_last else None
            return _visit(scratch, slot, warpgroup, softmax, used, scale, interpret)

        last = jnp.maximum(place.num_steps - 1, 0)
        softmax = softmaxes.empty_softmax(width)
        softmax = scratch.ring.use(0, last, softmax, functools.partial(visit, is_last=False))
        softmax = scratch.ring.use(
            last, place.num_steps, softmax, functools.partial(visit, is_last=True)
        )
        # The output takes the place of the queries, which both warpgroups read.
        meet(scratch.met)
        part = out.at[(*target, pl.ds(warpgroup * width, width))]
        _store(scratch.q_latent.at[warpgroup], softmax, part)

        @pl.when(warpgroup == 0)
        def _():
            found = softmax.largest / LOG2_E + jnp.log(jnp.maximum(softmax.total, _LEAST))
            scratch.log_sum[...] = jnp.where(softmax.total > 0.0, found, MASKED)
            copy_out((scratch.log_sum,), (log_sum.at[target],))

    program.specialise(compute, lambda: _copy(arrays, scratch, place))


def _copy(arrays: list[Any], scratch: _Scratch, place: _Place) -> None:
    """Brings the queries, then the blocks of the split; latents as each warpgroup's columns."""
    q_latent, q_rope, latents, k_rope = arrays
    width = q_latent.shape[2] // COMPUTE
    parts = [pl.ds(i * width, width) for i in range(COMPUTE)]

    def bring(of_latents, of_rope, rows, targets, barrier):
        sources = [of_latents.at[place.sequence, rows, part] for part in parts]
        sources.append(of_rope.at[place.sequence, rows])
        copy_in(sources, targets, barrier)

    targets = [scratch.q_latent.at[i] for i in range(COMPUTE)]
    bring(q_latent, q_rope, place.heads, (*targets, scratch.q_rope), scratch.q_arrived)

    def copies(step, slot, barrier):
        rows = pl.ds((place.first + step) * _BLOCK, _BLOCK)
        targets = [scratch.latents.at[slot, i] for i in range(COMPUTE)]
        bring(latents, k_rope, rows, (*targets, scratch.k_rope.at[slot]), barrier)

    scratch.ring.fill(place.num_steps, copies)


def _visit(scratch, slot, warpgroup, softmax, used, scale, interpret):
    """Meets the heads with a block; `used` of its positions count, all if None."""
    values = scratch.latents.at[slot, warpgroup]
    if used is not None:
        # Zero times what a cache holds behind the sequence might not be zero.
        keep_rows(values, 0, used)
        plgpu.commit_smem()
        meet(scratch.met)
    products = [Factors(scratch.q_rope, scratch.k_rope.at[slot], True)]
    for part in (warpgroup, COMPUTE - 1 - warpgroup):
        products.append(Factors(scratch.q_latent.at[part], scratch.latents.at[slot, part], True))
    (logits,) = multiply([Sum(products, zeros(ROWS, _BLOCK))], interpret)
    logits = logits * (scale * LOG2_E)
    if used is not None:
        position = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = jnp.where(position < used, logits, MASKED)
    softmax, exponentials = softmaxes.add_logits(softmax, logits)
    product = Factors(exponentials.astype(values.dtype), values)
    (weighted,) = multiply([Sum([product], softmax.weighted)], interpret)
    return softmax._replace(weighted=weighted)


def _store(ref: Any, softmax: softmaxes.Softmax, target: Any) -> None:
    total, weighted = softmax.total, softmax.weighted
    inverse = jnp.where(total > 0.0, 1.0 / jnp.maximum(total, _LEAST), 0.0)
    ref[...] = (weighted * softmaxes.along_rows(inverse, weighted.shape)).astype(ref.dtype)
    copy_out((ref,), (target,))
