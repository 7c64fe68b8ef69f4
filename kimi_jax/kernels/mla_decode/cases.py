"""Shapes that decoding is tested and timed with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.cost import Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences of the given lengths in a cache of `positions`."""

    lengths: tuple[int, ...]
    positions: int
    heads: int
    latent: int
    rope: int


TOY = {
    "one_position": Case(lengths=(1,), positions=1, heads=2, latent=8, rope=4),
    "ragged": Case(lengths=(1, 16, 17, 50, 33, 0), positions=50, heads=3, latent=8, rope=4),
    "whole_blocks": Case(lengths=(64, 32), positions=64, heads=2, latent=6, rope=2),
}
KIMI_K2 = {
    "16_of_4096": Case(lengths=(4096,) * 16, positions=4096, heads=64, latent=512, rope=64),
    "16_ragged_to_32768": Case(
        lengths=tuple(2048 * i for i in range(1, 17)),
        positions=32768,
        heads=64,
        latent=512,
        rope=64,
    ),
    "2_of_131072": Case(lengths=(131072,) * 2, positions=131072, heads=64, latent=512, rope=64),
}


def operands(case: Case, key: Array) -> dict[str, Array]:
    """Returns random bfloat16 operands by name, and the lengths."""
    batch = len(case.lengths)
    shapes = {
        "q_latent": (batch, case.heads, case.latent),
        "q_rope": (batch, case.heads, case.rope),
        "latents": (batch, case.positions, case.latent),
        "k_rope": (batch, case.positions, case.rope),
    }
    keys = jax.random.split(key, len(shapes))
    arrays = {
        name: jax.random.normal(of_array, shape, jnp.bfloat16)
        for of_array, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return arrays | {"lengths": jnp.array(case.lengths, jnp.int32)}


def cost(case: Case) -> Cost:
    """Counts the positions that are used."""
    used, width = sum(case.lengths), case.latent + case.rope
    queries = len(case.lengths) * case.heads
    return Cost(
        flops=2 * used * case.heads * (width + case.latent),
        bytes=2 * used * width + 2 * queries * (width + case.latent) + 4 * len(case.lengths),
    )
