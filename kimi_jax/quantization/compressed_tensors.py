"""The layout in which vLLM and SGLang read INT4 weights: compressed-tensors' pack-quantized.

Kimi K2 Thinking is released in it. A Linear's weight [out, in] becomes three tensors:
`weight_packed`, int32 [out, in / 8], `weight_scale`, bfloat16 [out, in / 32], and `weight_shape`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight


class PackedLinear(NamedTuple):
    """The tensors of one Linear, or of a stack of them, by their published names."""

    weight_packed: Int[Array, "*stack out words"]
    weight_scale: Float[Array, "*stack out groups"]
    weight_shape: np.ndarray  # int64 [2]: out, in


def to_compressed_tensors(weight: Int4Weight) -> PackedLinear:
    """Transposes codes and scales; nothing is unpacked or rounded."""
    inputs, outputs = weight.shape[-2:]
    return PackedLinear(
        weight_packed=jnp.swapaxes(weight.codes, -1, -2),
        weight_scale=jnp.swapaxes(weight.scales, -1, -2),
        weight_shape=np.array([outputs, inputs]),
    )


def from_compressed_tensors(tensors: PackedLinear) -> Int4Weight:
    """Undoes `to_compressed_tensors`, bit for bit.

    Raises:
      ValueError: the tensors do not fit each other.
    """
    packed, scale = tensors.weight_packed, tensors.weight_scale
    outputs, inputs = (int(size) for size in tensors.weight_shape)
    words = inputs // CODES_PER_WORD
    fits = packed.shape[-2:] == (outputs, words) and scale.shape[:-1] == packed.shape[:-1]
    if not fits or inputs % scale.shape[-1]:
        raise ValueError(
            f"weight_packed {packed.shape} and weight_scale {scale.shape} do not belong to a "
            f"weight [{outputs}, {inputs}]: they must be [..., {outputs}, {words}] and "
            f"[..., {outputs}, groups], whose number divides {inputs}"
        )
    return Int4Weight(codes=jnp.swapaxes(packed, -1, -2), scales=jnp.swapaxes(scale, -1, -2))
