"""Sums of products on Hopper's tensor cores."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array


class Factors(NamedTuple):
    """One product a @ b, or a @ b^T."""

    a: Any  # [m, k], in shared memory or registers
    b: Any  # [k, n], or [n, k] if transposed, in shared memory
    transposed: bool = False


class Sum(NamedTuple):
    """start + the products of all factors, [m, n], accumulated in float32."""

    factors: Sequence[Factors]
    start: Array


def multiply(sums: Sequence[Sum], interpret: bool) -> tuple[Array, ...]:
    """Returns the sums; the tensor cores are given all products before the first is awaited."""
    if interpret:
        return tuple(_multiply_interpreted(*a_sum) for a_sum in sums)

    def accumulate(total_refs):
        for total_ref, (factors, _) in zip(total_refs, sums, strict=True):
            for a, b, transposed in factors:
                plgpu.wgmma(total_ref, a, b.transpose((1, 0)) if transposed else b)

    return pl.run_state(accumulate)(tuple(plgpu.ACC.init(start) for _, start in sums))


def _multiply_interpreted(factors: Sequence[Factors], total: Array) -> Array:
    for a, b, transposed in factors:
        dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
        total += jax.lax.dot_general(a[...], b[...], dimensions, preferred_element_type=jnp.float32)
    return total


def zeros(rows: int, columns: int) -> Array:
    """Returns a start for a sum, [rows, columns]."""
    return jnp.zeros((rows, columns), jnp.float32)
