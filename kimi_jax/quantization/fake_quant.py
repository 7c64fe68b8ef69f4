"""Training with rounded weights: forward as quantised, gradients straight through."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kimi_jax.core.param_spec import Leaf
from kimi_jax.quantization import int4
from kimi_jax.quantization.int4 import Int4Weight


@struct.dataclass
class FakeQuantized:
    """A weight in training: computed with as `quantized`, moved by the gradient of `carrier`."""

    carrier: Leaf  # [..., K, N]; its values are never read
    quantized: Int4Weight

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


def _straight_through_backward(like: Array, gradient: Array):
    return gradient.astype(like.dtype), None


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def dense(weight: Weight, dtype: DTypeLike) -> Float[Array, "*weight"]:
    """Returns the values of a weight in any form; gradients go to an array or a carrier."""
    if isinstance(weight, FakeQuantized):
        return straight_through(weight.carrier, int4.dequantize(weight.quantized, dtype))
    if isinstance(weight, Int4Weight):
        return int4.dequantize(weight, dtype)
    return weight
