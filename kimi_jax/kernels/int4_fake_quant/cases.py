"""Shapes that the product with a rounded weight is tested, timed and tuned with."""

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
    "small_groups": Case(rows=16, inputs=64, outputs=130, group_size=8),
}
# An expert of Kimi K2 in training: up and gate, then down; rows of a micro-batch.
KIMI_K2 = {
    f"train_{rows}_{name}": Case(rows=rows, inputs=inputs, outputs=outputs)
    for name, inputs, outputs in (("up", 7168, 2048), ("down", 2048, 7168))
    for rows in (1024, 4096)
}


def operands(case: Case, key: Array) -> dict:
    """Returns random bfloat16 activations `x` and weight `w`."""
    of_x, of_w = jax.random.split(key)
    return {
        "x": jax.random.normal(of_x, (case.rows, case.inputs), jnp.bfloat16),
        "w": jax.random.normal(of_w, (case.inputs, case.outputs), jnp.bfloat16),
    }


def cost(case: Case) -> Cost:
    """Counts the product, and bfloat16 weights and activations; rounding counts nothing."""
    weights = case.inputs * case.outputs
    return Cost(
        flops=2 * case.rows * weights,
        bytes=2 * (weights + case.rows * (case.inputs + case.outputs)),
    )
