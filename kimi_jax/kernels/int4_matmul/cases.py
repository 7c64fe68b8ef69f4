"""Shapes that the product with INT4 weights is tested, timed and tuned with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.cost import Cost
from kimi_jax.quantization import int4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of activations, sizes of the weight, and weights that share a scale."""

    rows: int
    inputs: int
    outputs: int
    group_size: int = int4.GROUP_SIZE


TOY = {
    "one_row": Case(rows=1, inputs=256, outputs=128),
    "odd_rows_and_outputs": Case(rows=19, inputs=96, outputs=200),
    "two_tiles_each_way": Case(rows=40, inputs=512, outputs=256),
    "large_groups": Case(rows=16, inputs=384, outputs=130, group_size=64),
}
# An expert of Kimi K2 in decoding and in prefill: up and gate, then down.
KIMI_K2 = {
    f"{kind}_{rows}_{name}": Case(rows=rows, inputs=inputs, outputs=outputs)
    for name, inputs, outputs in (("up", 7168, 2048), ("down", 2048, 7168))
    for kind, many in (("decode", (1, 16, 64, 256)), ("prefill", (1024, 4096)))
    for rows in many
}


def operands(case: Case, key: Array) -> dict:
    """Returns random bfloat16 activations `x` and the quantised weight `w`."""
    of_x, of_w = jax.random.split(key)
    w = jax.random.normal(of_w, (case.inputs, case.outputs), jnp.bfloat16)
    return {
        "x": jax.random.normal(of_x, (case.rows, case.inputs), jnp.bfloat16),
        "w": int4.quantize(w, case.group_size),
    }


def cost(case: Case) -> Cost:
    """Counts the product, codes of half a byte, scales and activations of two."""
    weights = case.inputs * case.outputs
    stored = weights / 2 + weights / case.group_size * 2
    return Cost(
        flops=2 * case.rows * weights,
        bytes=stored + 2 * case.rows * (case.inputs + case.outputs),
    )
