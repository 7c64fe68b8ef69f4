"""Weights in four bits inside TPU kernels."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tpu
from kimi_jax.quantization.int4 import ZERO_WORD


def dequantize(words: Array, scales: Array, dtype: Any) -> Array:
    """Returns the values of a tile, as `quantization.int4.dequantize` does.

    A word of eight codes is reinterpreted as int4 values, which the chip converts four times faster
    than a program of shifts does. A code of three bits times a scale of eight is exact before it is
    rounded, in bfloat16 as in float32, so that both give the same values.

    Args:
      words: codes of the tile, [rows / 8, columns].
      scales: [groups, columns].
      dtype: of the values.
    """
    in_bfloat16 = dtype == jnp.bfloat16 and tpu.facts(target_chip()).bfloat16_vectors
    arithmetic = jnp.bfloat16 if in_bfloat16 else jnp.float32
    # Where a nibble is code + 8, flipping its highest bit gives two's complement.
    codes = pltpu.bitcast(words ^ jnp.int32(ZERO_WORD), jnp.int4).astype(arithmetic)
    groups = codes.reshape(scales.shape[0], -1, scales.shape[1])
    return (groups * scales.astype(arithmetic)[:, None]).reshape(codes.shape).astype(dtype)
