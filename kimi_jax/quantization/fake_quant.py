"""Training with rounded weights: forward as quantised, gradients straight through."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kimi_jax.core.param_spec import Leaf
from kimi_jax.quantization import int4
from kimi_jax.quantization.formats import QUANTIZED, dequantize
from kimi_jax.quantization.int4 import Int4Weight


@struct.dataclass
class FakeQuantized:
    """A weight in training: computed with as `quantized`, moved by the gradient of `carrier`."""

    carrier: Leaf  # [..., K, N]; its values are never read
    quantized: Leaf  # its quantised weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.quantized.shape

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return self.quantized.ndim


Weight = Array | Int4Weight | FakeQuantized


@jax.custom_vjp
def straight_through(
    carrier: Float[Array, "*weight"], values: Float[Array, "*weight"]
) -> Float[Array, "*weight"]:
    """Returns `values`, whose gradient is the carrier's (Bengio et al., arXiv 1308.3432)."""
    del carrier
    return values


def _straight_through_forward(carrier: Array, values: Array):
    return values, jnp.zeros((), carrier.dtype)


def _straight_through_backward(like, gradient):
    return gradient.astype(like.dtype), None


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def fake_quant(
    w: Float[Array, "*stack K N"],
    group_size: int = int4.GROUP_SIZE,
    scales: Float[Array, "*stack groups N"] | None = None,
) -> Float[Array, "*stack K N"]:
    """Returns w rounded to INT4, in w's dtype, with w's own gradient unless the code saturates.

    A code saturates where |w / s| > 7.5. Only scales that are given can be that small: a group's
    largest weight is 7 times its own scale, or a little more, since that is rounded to bfloat16.
    How the scale depends on the largest weight is left out of the gradient.

    Args:
      w: weights; groups lie along K.
      group_size: G.
      scales: bfloat16, to be used as they are.
    """
    rounded = int4.quantize(jax.lax.stop_gradient(w), group_size, scales)
    carrier = w
    if scales is not None:
        largest = (int4.LARGEST_CODE + 0.5) * scales.astype(jnp.float32)
        inside = jnp.abs(w) <= jnp.repeat(largest, group_size, axis=-2)
        carrier = jnp.where(inside, w, jax.lax.stop_gradient(w))
    return straight_through(carrier, int4.dequantize(rounded, w.dtype))


def dense(weight: Weight, dtype: DTypeLike) -> Float[Array, "*weight"]:
    """Returns the values of a weight in any form; gradients go to an array or a carrier."""
    if isinstance(weight, FakeQuantized):
        return straight_through(weight.carrier, dequantize(weight.quantized, dtype))
    if isinstance(weight, QUANTIZED):
        return dequantize(weight, dtype)
    return weight
