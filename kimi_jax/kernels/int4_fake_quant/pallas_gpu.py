"""The product with a weight rounded to four bits on Hopper GPUs: XLA rounds, a kernel multiplies.

Not fused: the kernel never sees the weight itself. XLA rounds it once in forward and once in
backward, for all rows, and writes codes and scales of 4.5 bits a weight to the device's memory,
which `hopper/int4_products.py` reads back and dequantises once for each 128 rows. Bytes: in each
direction those of the weight once, and of 4.5 bits once written and once read.

Why not: a weight that is rounded in the kernel, once for all rows, has to stay in shared memory.
That holds 56 columns of 7168 inputs, in 4.5 bits and without room for rows, and each row would be
read again for every 56 columns; parts of the inputs would need sums in memory instead. Rounding
again for each 128 rows takes longer than their product.

Compiled for an H100 and interpreted on a CPU; never timed.
"""

import functools

import jax
from jaxtyping import Array, Float

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.int4_matmul import pallas_gpu
from kimi_jax.kernels.products import dot
from kimi_jax.quantization import int4


def int4_fake_quant(
    x: Float[Array, "W K"], w: Float[Array, "K N"], group_size: int, *, interpret: bool = False
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_fake_quant` describes, in bfloat16 on a Hopper GPU.

    Args:
      x: activations.
      w: weights.
      group_size: weights along K that share a scale, a multiple of 32.
      interpret: runs on any platform, slowly.

    Raises:
      NotImplementedError: another GPU, another dtype of x, or another group size.
    """
    return _int4_fake_quant(x, w, group_size, interpret)


def int4_fake_quant_transposed(
    d_y: Float[Array, "W N"], w: Float[Array, "K N"], group_size: int, *, interpret: bool = False
) -> Float[Array, "W K"]:
    """Returns d_y q^T, the gradient of x."""
    program.require("int4_fake_quant", d_y.dtype, interpret)
    quantized = int4.quantize(w, group_size)
    return pallas_gpu.int4_matmul_transposed(d_y, quantized, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _int4_fake_quant(x: Array, w: Array, group_size: int, interpret: bool) -> Array:
    program.require("int4_fake_quant", x.dtype, interpret)
    return pallas_gpu.int4_matmul(x, int4.quantize(w, group_size), interpret=interpret)


def _forward(x: Array, w: Array, group_size: int, interpret: bool):
    return _int4_fake_quant(x, w, group_size, interpret), (x, w)


def _backward(group_size: int, interpret: bool, residuals, d_y: Array):
    x, w = residuals
    d_x = int4_fake_quant_transposed(d_y, w, group_size, interpret=interpret)
    return d_x, dot(x, d_y, 0, 0).astype(w.dtype)


_int4_fake_quant.defvjp(_forward, _backward)
