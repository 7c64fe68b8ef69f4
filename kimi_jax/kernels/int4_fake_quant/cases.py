"""Shapes that the product with a rounded weight is tested, timed and tuned with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels import int4_cases
from kimi_jax.kernels.cost import Cost
from kimi_jax.kernels.int4_cases import Case

TOY = int4_cases.TOY | {"small_groups": Case(rows=16, inputs=64, outputs=130, group_size=8)}
KIMI_K2 = int4_cases.of_experts({"train": (1024, 4096)})  # rows of a micro-batch


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
