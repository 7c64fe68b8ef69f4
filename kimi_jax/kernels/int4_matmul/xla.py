"""Weights written out and multiplied, in forward and again in backward, so that none are kept."""

import jax
from jaxtyping import Array, Float

from kimi_jax.kernels.products import dot
from kimi_jax.quantization import int4
from kimi_jax.quantization.int4 import Int4Weight


@jax.custom_vjp
def int4_matmul(x: Float[Array, "W K"], w: Int4Weight) -> Float[Array, "W N"]:
    """Computes what the package's `int4_matmul` describes."""
    return dot(x, int4.dequantize(w, x.dtype), 1, 0).astype(x.dtype)


def int4_matmul_transposed(d_y: Float[Array, "W N"], w: Int4Weight) -> Float[Array, "W K"]:
    """Returns d_y dequantize(w)^T, the gradient of x."""
    return dot(d_y, int4.dequantize(w, d_y.dtype), 1, 1).astype(d_y.dtype)


def _forward(x: Array, w: Int4Weight):
    return int4_matmul(x, w), w


def _backward(w: Int4Weight, d_y: Array):
    return int4_matmul_transposed(d_y, w), None


int4_matmul.defvjp(_forward, _backward)
