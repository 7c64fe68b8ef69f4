"""Products of activations and weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kimi_jax.parallel.rules import here


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def project(
    equation: str,
    x: Float[Array, "*x"],
    w: Float[Array, "*w"],
    out_dtype: Any = None,
    out_layout: PartitionSpec | None = None,
) -> Float[Array, "*y"]:
    """Returns einsum(equation, x, w), summed in float32.

    The backward pass rounds the incoming gradient to x's dtype, and lays each gradient out like
    what it belongs to: where x is split over the batch and w is whole, w's is all-reduced; where
    w's outputs are split, x's is. It is written out because XLA's own choice costs time on a CPU:
    bfloat16 products run at half speed unless they ask for float32 sums, and gradients of weights
    come out transposed and are copied.

    Args:
      equation: two operands and a result, every index of an operand in one of the other two.
      x: activations.
      w: weights of the same dtype.
      out_dtype: of the result; None is x's.
      out_layout: of the result; needed where both operands are split along an index they share,
        whose partial sums are all-reduced. Without meaning inside per-device code.

    Returns:
      The product, x's batch layout kept.
    """
    if _layout(x) is None:
        out_layout = None
    elif out_layout is not None:
        out_layout = here(out_layout)
    return _einsum(equation, x, w, out_dtype or x.dtype, out_layout)


def _einsum(equation: str, x: Array, w: Array, dtype: Any, out_sharding: Any = None) -> Array:
    product = jnp.einsum(
        equation, x, w, preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
    return product.astype(dtype)


def _forward(equation, x, w, out_dtype, out_layout):
    return project(equation, x, w, out_dtype, out_layout), (x, w)


def _backward(equation, out_dtype, out_layout, residuals, dy):
    del out_layout
    x, w = residuals
    operands, result = equation.split("->")
    x_indices, w_indices = operands.split(",")
    dy = dy.astype(x.dtype)
    dx = _einsum(f"{result},{w_indices}->{x_indices}", dy, w, x.dtype, _layout(x))
    dw = _einsum(f"{x_indices},{result}->{w_indices}", x, dy, w.dtype, _layout(w))
    return dx, dw


def _layout(array: Array) -> Any:
    """The array's sharding, or None inside per-device code, where there is none to name."""
    sharding = jax.typeof(array).sharding
    return None if sharding.mesh.are_all_axes_manual or sharding.mesh.empty else sharding


project.defvjp(_forward, _backward)
