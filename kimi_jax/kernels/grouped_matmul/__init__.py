"""Rows sorted by group, each multiplied with its group's matrix."""

import jax
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.checks import check_same_dtype, check_shapes
from kimi_jax.kernels.grouped_matmul import pallas_gpu, pallas_tpu, reference, xla
from kimi_jax.kernels.selection import select
from kimi_jax.quantization.fake_quant import FakeQuantized
from kimi_jax.quantization.int4 import Int4Weight

_AVAILABLE = {
    Implementation.XLA: xla.grouped_matmul,
    Implementation.PALLAS_TPU: pallas_tpu.grouped_matmul,
    Implementation.PALLAS_GPU: pallas_gpu.grouped_matmul,
    Implementation.REFERENCE: reference.grouped_matmul,
}
# The kernels for GPUs were compiled, never run.
_FASTEST = {"tpu": Implementation.PALLAS_TPU}


@jax.named_scope("grouped_matmul")
def grouped_matmul(
    x: Float[Array, "A K"],
    w: Float[Array, "E K N"] | Int4Weight | FakeQuantized,
    group_sizes: Int[Array, "E"],
    *,
    implementation: Implementation = Implementation.AUTO,
) -> Float[Array, "A N"]:
    """Returns y[i] = x[i] w[e] for each row i of group e; rows of no group give zeros.

    Args:
      x: rows, those of group 0 first.
      w: one matrix for each group, [E, K, N]: an array in the rows' dtype, packed, or packed with
        a carrier, which then gets the gradient.
      group_sizes: rows of each group, 0 allowed, at most A together; the rows after them belong to
        no group and get no gradient.
      implementation: which program computes it.

    Returns:
      The products, in the rows' dtype; sums are float32.

    Raises:
      ValueError: shapes do not fit, or dtypes differ.
      NotImplementedError: the named implementation does not exist.
    """
    check_shapes(
        "grouped_matmul",
        {"x": (x, "A K"), "w": (w, "E K N"), "group_sizes": (group_sizes, "E")},
    )
    check_same_dtype("grouped_matmul", {"x": x, "w": w})
    return select("grouped_matmul", implementation, _AVAILABLE, _FASTEST)(x, w, group_sizes)


__all__ = ["grouped_matmul"]
