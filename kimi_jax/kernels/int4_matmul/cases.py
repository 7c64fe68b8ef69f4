"""Shapes that the product with INT4 weights is tested, timed and tuned with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels import int4_cases
from kimi_jax.kernels.cost import Cost
from kimi_jax.kernels.int4_cases import Case
from kimi_jax.quantization import int4

TOY = int4_cases.TOY
KIMI_K2 = int4_cases.of_experts({"decode": (1, 16, 64, 256), "prefill": (1024, 4096)})


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
