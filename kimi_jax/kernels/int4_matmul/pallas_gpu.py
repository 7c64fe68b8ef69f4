"""The product with INT4 weights on Hopper GPUs: rows are one group of `hopper/int4_products.py`.

Up to 64 of them, as in decoding, have a kernel of their own, `hopper/int4_few_rows.py`.

Compiled for an H100 and interpreted on a CPU; never timed.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.kernels.hopper import int4_few_rows, int4_products, program
from kimi_jax.quantization.int4 import Int4Weight


def int4_matmul(
    x: Float[Array, "W K"], w: Int4Weight, *, interpret: bool = False
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_matmul` describes, in bfloat16 on a Hopper GPU.

    Args:
      x: activations.
      w: one matrix.
      interpret: runs on any platform, slowly.

    Raises:
      NotImplementedError: another GPU, another dtype, or scales of fewer than 32 weights.
    """
    return _int4_matmul(x, w, interpret)


def int4_matmul_transposed(
    d_y: Float[Array, "W N"], w: Int4Weight, *, interpret: bool = False
) -> Float[Array, "W K"]:
    """Returns d_y dequantize(w)^T, the gradient of x."""
    program.require("int4_matmul", d_y.dtype, interpret)
    sizes = jnp.full((1,), d_y.shape[0], jnp.int32)
    return int4_products.multiply_transposed(d_y, _stack(w), sizes, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _int4_matmul(x: Array, w: Int4Weight, interpret: bool) -> Array:
    program.require("int4_matmul", x.dtype, interpret)
    if x.shape[0] <= int4_few_rows.MOST_ROWS:
        return int4_few_rows.multiply(x, _stack(w), interpret=interpret)
    sizes = jnp.full((1,), x.shape[0], jnp.int32)
    return int4_products.multiply(x, _stack(w), sizes, interpret=interpret)


def _forward(x: Array, w: Int4Weight, interpret: bool):
    return _int4_matmul(x, w, interpret), w


def _backward(interpret: bool, w: Int4Weight, d_y: Array):
    return int4_matmul_transposed(d_y, w, interpret=interpret), None


_int4_matmul.defvjp(_forward, _backward)


def _stack(w: Int4Weight) -> Int4Weight:
    return jax.tree.map(lambda leaf: leaf[None], w)
