"""Decoding in Pallas for TPUs.

Grid: sequences, blocks of cached positions; the latter one after the other, with the online softmax
(arXiv 2112.05682) of all heads in VMEM.

Rotated keys are read with their positions last, which is how XLA lays out an array whose rows are
shorter than 128: no copy, and no padding.

Bytes: a block's latents are read once, as keys and as values of all heads. Behind a sequence's end
the index of the block stays at the last one with positions, so that nothing more is copied: a
ragged batch costs its own lengths, not the longest one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tile_table, tpu
from kimi_jax.kernels.cost import Cost
from kimi_jax.kernels.mla_decode import cases
from kimi_jax.kernels.mla_decode.cases import Case
from kimi_jax.kernels.products import dot
from kimi_jax.kernels.tunable import Tiles, Tunable

_MASKED = -1e30  # logit of an unused position; finite, so that differences of two are numbers
_BLOCK = 2048  # positions, where no table says otherwise
_BLOCKS = (512, 1024, 2048, 4096)

F32 = jnp.float32


def mla_decode(
    q_latent: Float[Array, "B N C"],
    q_rope: Float[Array, "B N R"],
    latents: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    tiles: dict[str, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "B N C"]:
    """Computes what the package's `mla_decode` describes.

    `tiles` has the positions of a `block`; `interpret` runs it on a CPU.
    """
    batch, heads, width = q_latent.shape
    positions, rope = k_rope.shape[1:]
    shape = {"rows": positions, "heads": heads, "latent": width, "rope": rope}
    tiles = tiles or tile_table.tiles("mla_decode", **shape) or {"block": _BLOCK}
    block = min(tiles["block"], positions)

    def of_sequence(b, j, lengths):
        return b, 0, 0

    def of_cache(b, j, lengths):
        return b, jnp.minimum(j, jnp.maximum(pl.cdiv(lengths[b], block) - 1, 0)), 0

    return pl.pallas_call(
        functools.partial(_kernel, block=block, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(positions, block)),
            in_specs=[
                pl.BlockSpec((None, heads, width), of_sequence),
                pl.BlockSpec((None, heads, rope), of_sequence),
                pl.BlockSpec((None, block, width), of_cache),
                pl.BlockSpec((None, rope, block), lambda *at: _swapped(of_cache(*at))),
            ],
            out_specs=pl.BlockSpec((None, heads, width), of_sequence),
            scratch_shapes=[
                pltpu.VMEM((heads, 1), F32),
                pltpu.VMEM((heads, 1), F32),
                pltpu.VMEM((heads, width), F32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_latent.shape, latents.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu.facts(target_chip()).vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * positions * heads * (2 * width + rope),
            transcendentals=batch * positions * heads,
            bytes_accessed=latents.dtype.itemsize * (latents.size + k_rope.size),
        ),
        interpret=interpret,
        name="mla_decode",
    )(lengths.astype(jnp.int32), q_latent, q_rope, latents, k_rope.transpose(0, 2, 1))


def _swapped(at: tuple) -> tuple:
    return at[0], at[2], at[1]


def _kernel(lengths, q_latent, q_rope, latents, k_rope, out, *sums, block, scale):
    largest, total, weighted = sums
    j = pl.program_id(1)
    length = lengths[pl.program_id(0)]

    @pl.when(j == 0)
    def _():
        largest[...] = jnp.full_like(largest, _MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def step(is_last):
        values = latents[...]
        if is_last:
            # Behind the end may lie anything, even what is not a number.
            used = jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length - j * block
            values = jnp.where(used, values, 0)
        logits = dot(q_latent[...], values, 1, 1) + dot(q_rope[...], k_rope[...], 1, 0)
        logits *= scale
        if is_last:
            position = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(position < length - j * block, logits, _MASKED)
        new_largest = jnp.maximum(largest[...], jnp.max(logits, axis=1, keepdims=True))
        fading = jnp.exp(largest[...] - new_largest)
        exponentials = jnp.exp(logits - new_largest)
        largest[...] = new_largest
        total[...] = fading * total[...] + jnp.sum(exponentials, axis=1, keepdims=True)
        part = dot(exponentials.astype(values.dtype), values, 1, 0)
        weighted[...] = fading * weighted[...] + part

    end = (j + 1) * block
    pl.when(end <= length)(lambda: step(is_last=False))
    pl.when((end > length) & (j * block < length))(lambda: step(is_last=True))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        positive = jnp.where(total[...] > 0.0, total[...], 1.0)
        out[...] = (weighted[...] / positive).astype(out.dtype)


def _frequencies(case: Case, chip: str, tiles: Tiles) -> dict[str, tuple[float, ...]]:
    """Follows the kernel: sums set to zero, whole blocks, the block with the end, the output."""
    del chip
    block = tiles["block"]
    columns = -(-case.positions // block)
    steps = len(case.lengths) * columns
    whole = sum(length // block for length in case.lengths) / steps
    cut = sum(length % block > 0 for length in case.lengths) / steps
    once = () if columns == 1 else (1 / columns,)
    return {"mla_decode": (*once, whole, cut, *once)}


def _cost(case: Case, tiles: Tiles) -> Cost:
    """Counts whole blocks."""
    block = tiles["block"]
    lengths = tuple(math.ceil(length / block) * block for length in case.lengths)
    return cases.cost(dataclasses.replace(case, lengths=lengths))


def _run(operands: dict[str, Array], tiles: Tiles) -> Array:
    width = operands["q_latent"].shape[-1] + operands["q_rope"].shape[-1]
    return mla_decode(**operands, scale=width**-0.5, tiles=dict(tiles))


TUNABLE = {
    "mla_decode": Tunable(
        shape=lambda case: {
            "rows": case.positions,
            "heads": case.heads,
            "latent": case.latent,
            "rope": case.rope,
        },
        operands=cases.operands,
        # Not the whole cache: a short sequence would read all of it.
        candidates=lambda case, chip: [{"block": b} for b in _BLOCKS if 2 * b <= case.positions],
        frequencies=_frequencies,
        run=_run,
        cost=_cost,
    )
}
