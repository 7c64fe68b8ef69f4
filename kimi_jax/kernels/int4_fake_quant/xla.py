"""Weights rounded and multiplied, in forward and again in backward, so that none are kept."""

import functools

import jax
from jaxtyping import Array, Float

from kimi_jax.kernels.products import dot
from kimi_jax.quantization import int4


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def int4_fake_quant(
    x: Float[Array, "W K"], w: Float[Array, "K N"], group_size: int
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_fake_quant` describes."""
    return dot(x, _rounded(w, group_size, x.dtype), 1, 0).astype(x.dtype)


def int4_fake_quant_transposed(
    d_y: Float[Array, "W N"], w: Float[Array, "K N"], group_size: int
) -> Float[Array, "W K"]:
    """Returns d_y fake_quant(w)^T, the gradient of x."""
    return dot(d_y, _rounded(w, group_size, d_y.dtype), 1, 1).astype(d_y.dtype)


def _rounded(w: Array, group_size: int, dtype) -> Array:
    return int4.dequantize(int4.quantize(w, group_size), dtype)


def _forward(x: Array, w: Array, group_size: int):
    return int4_fake_quant(x, w, group_size), (x, w)


def _backward(group_size: int, residuals, d_y: Array):
    x, w = residuals
    d_x = int4_fake_quant_transposed(d_y, w, group_size)
    return d_x, dot(x, d_y, 0, 0).astype(w.dtype)


int4_fake_quant.defvjp(_forward, _backward)
