"""Activations times a weight that is rounded to four bits on the way: training for INT4."""

import jax
from jaxtyping import Array, Float

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.checks import check_shapes
from kimi_jax.kernels.int4_fake_quant import pallas_gpu, pallas_tpu, reference, xla
from kimi_jax.kernels.selection import select
from kimi_jax.quantization.int4 import GROUP_SIZE

_AVAILABLE = {
    Implementation.XLA: xla.int4_fake_quant,
    Implementation.PALLAS_TPU: pallas_tpu.int4_fake_quant,
    Implementation.PALLAS_GPU: pallas_gpu.int4_fake_quant,
    Implementation.REFERENCE: reference.int4_fake_quant,
}
# For GPUs the kernel rounds no faster than XLA and its product was never timed.
_FASTEST = {"tpu": Implementation.PALLAS_TPU}


@jax.named_scope("int4_fake_quant")
def int4_fake_quant(
    x: Float[Array, "W K"],
    w: Float[Array, "K N"],
    *,
    group_size: int = GROUP_SIZE,
    implementation: Implementation = Implementation.AUTO,
) -> Float[Array, "W N"]:
    """Returns y = x q, where q = dequantize(quantize(w)); sums are float32.

    Gradients: dx = dy q^T; dw = x^T dy, straight through. A mask for saturated weights would change
    nothing: with a scale of absmax / 7, |w / scale| never exceeds 7 by more than the rounding of
    the scale, and 7.5 is where a code saturates.

    Args:
      x: activations.
      w: weights of any floating dtype, rounded to bfloat16 before they are quantised.
      group_size: weights along K that share a scale; a multiple of 8 that divides K.
      implementation: which program computes it.

    Returns:
      The product, in x's dtype.

    Raises:
      ValueError: shapes do not fit, or the group size does not divide K.
      NotImplementedError: the named implementation does not exist, or not on this platform.

    Source: `quantization.int4` says the rule of rounding; Bengio et al., arXiv 1308.3432, the
    gradient.
    """
    check_shapes("int4_fake_quant", {"x": (x, "W K"), "w": (w, "K N")})
    if w.shape[0] % group_size or group_size % 8:
        raise ValueError(
            f"int4_fake_quant: groups of {group_size} do not divide {w.shape[0]} inputs; choose a "
            "multiple of 8 that does"
        )
    return select("int4_fake_quant", implementation, _AVAILABLE, _FASTEST)(x, w, group_size)


__all__ = ["int4_fake_quant"]
