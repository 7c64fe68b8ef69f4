"""Activations times a weight stored in four bits."""

import jax
from jaxtyping import Array, Float

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.checks import check_shapes
from kimi_jax.kernels.int4_matmul import pallas_gpu, pallas_tpu, reference, xla
from kimi_jax.kernels.selection import select
from kimi_jax.quantization.int4 import Int4Weight

_AVAILABLE = {
    Implementation.XLA: xla.int4_matmul,
    Implementation.PALLAS_TPU: pallas_tpu.int4_matmul,
    Implementation.PALLAS_GPU: pallas_gpu.int4_matmul,
    Implementation.REFERENCE: reference.int4_matmul,
}
# The kernels for GPUs were compiled, never run.
_FASTEST = {"tpu": Implementation.PALLAS_TPU}


@jax.named_scope("int4_matmul")
def int4_matmul(
    x: Float[Array, "W K"],
    w: Int4Weight,
    *,
    implementation: Implementation = Implementation.AUTO,
) -> Float[Array, "W N"]:
    """Returns y = x dequantize(w); sums are float32.

    Weights are rounded to x's dtype once, after code * scale. The gradient is that of x,
    dx = dy dequantize(w)^T; none flows to codes or scales.

    Args:
      x: activations.
      w: one matrix, [K, N] when written out.
      implementation: which program computes it.

    Returns:
      The product, in x's dtype.

    Raises:
      ValueError: shapes do not fit.
      NotImplementedError: the named implementation does not exist, or not on this platform.

    Source: the release of Kimi K2 Thinking, whose routed experts are stored like this.
    """
    check_shapes("int4_matmul", {"x": (x, "W K"), "w": (w, "K N")})
    return select("int4_matmul", implementation, _AVAILABLE, _FASTEST)(x, w)


__all__ = ["int4_matmul"]
