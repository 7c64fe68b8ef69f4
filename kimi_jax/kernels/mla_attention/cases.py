"""Shapes that attention is tested and timed with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.cost import Cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape: sequences of `positions` tokens, each `documents` packed documents."""

    batch: int
    positions: int
    heads: int
    nope: int
    rope: int
    value: int
    documents: int = 1


TOY = {
    "one_token": Case(batch=1, positions=1, heads=2, nope=4, rope=2, value=3),
    "one_block": Case(batch=2, positions=50, heads=2, nope=8, rope=4, value=6, documents=3),
    "odd_strips": Case(batch=1, positions=150, heads=3, nope=8, rope=4, value=6, documents=2),
    "ragged_blocks": Case(batch=2, positions=523, heads=2, nope=8, rope=4, value=8, documents=3),
}
COMPARISON = Case(batch=8, positions=256, heads=8, nope=32, rope=16, value=32)
KIMI_K2 = {
    f"{positions}_positions": Case(
        batch=1, positions=positions, heads=heads, nope=128, rope=64, value=128
    )
    for positions, heads in ((4096, 64), (32768, 8), (131072, 8))  # longer ones with heads split
}


def operands(case: Case, key: Array) -> dict[str, Array]:
    """Returns random bfloat16 operands by name, and documents of equal length."""
    of_heads = (case.batch, case.positions, case.heads)
    shapes = {
        "q_nope": (*of_heads, case.nope),
        "q_rope": (*of_heads, case.rope),
        "k_nope": (*of_heads, case.nope),
        "k_rope": (case.batch, case.positions, case.rope),
        "value": (*of_heads, case.value),
    }
    keys = jax.random.split(key, len(shapes))
    arrays = {
        name: jax.random.normal(of_array, shape, jnp.bfloat16)
        for of_array, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    document = jnp.arange(case.positions) * case.documents // case.positions
    return arrays | {"segments": jnp.broadcast_to(document, (case.batch, case.positions))}


def cost(case: Case) -> Cost:
    """Counts the pairs of a query and a key that is not later, as if documents were one."""
    positions = case.batch * case.positions
    pairs = positions * (case.positions + 1) / 2 * case.heads
    widths = 2 * (case.nope + case.value) + case.rope  # of q_nope, k_nope, value, out, q_rope
    return Cost(
        flops=2 * pairs * (case.nope + case.rope + case.value),
        bytes=2 * positions * (case.heads * widths + case.rope) + 4 * positions,
    )
