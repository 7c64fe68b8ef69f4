"""Copies of rows, sorted by a key, and their sums; both without scattering."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from kimi_jax.core.param_spec import Leaf


@struct.dataclass
class SortedRows:
    """A permutation and its inverse."""

    source: Leaf  # [A] which entry stands in each sorted row
    place: Leaf  # [A] in which sorted row each entry stands


def sort_rows(keys: Int[Array, "A"]) -> SortedRows:
    """Sorts entries by key, equal ones in order."""
    source = jnp.argsort(keys)
    return SortedRows(source=source, place=jnp.argsort(source))


def linear_pair(
    forward: Callable[[Any, Array], Array], transpose: Callable[[Any, Array], Array]
) -> Callable[[Any, Array], Array]:
    """Returns `forward(plan, rows)`, linear in rows, with `transpose` as its backward pass.

    JAX would transpose a gather of rows into a scatter-add. Where every row is read a known number
    of times, the transpose is a gather, too, which accelerators do many times faster.
    """

    @jax.custom_vjp
    def apply(plan: Any, rows: Array) -> Array:
        return forward(plan, rows)

    def apply_forward(plan, rows):
        return forward(plan, rows), plan

    def apply_backward(plan, d_rows):
        return None, transpose(plan, d_rows)

    apply.defvjp(apply_forward, apply_backward)
    return apply


def spread(copies: int, order: SortedRows, x: Float[Array, "W D"]) -> Float[Array, "A D"]:
    """Copies row i of x to the sorted rows of entries i * copies .. (i + 1) * copies - 1."""
    return _pair(copies)[0](order, x)


def collect(copies: int, order: SortedRows, rows: Float[Array, "A D"]) -> Float[Array, "W D"]:
    """Adds up what `spread` copied, in float32."""
    return _pair(copies)[1](order, rows)


@functools.cache
def _pair(copies: int) -> tuple[Callable[..., Array], Callable[..., Array]]:
    def copy(order: SortedRows, x: Array) -> Array:
        return x[order.source // copies]

    def add(order: SortedRows, rows: Array) -> Array:
        by_source = rows[order.place].reshape(-1, copies, rows.shape[1])
        return jnp.sum(by_source, axis=1, dtype=jnp.float32).astype(rows.dtype)

    return linear_pair(copy, add), linear_pair(add, copy)
