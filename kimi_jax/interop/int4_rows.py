"""Rows of INT4 matrices on the host, in the layout of compressed-tensors' pack-quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.quantization import int4
from kimi_jax.quantization.compressed_tensors import (
    PackedLinear,
    from_compressed_tensors,
    to_compressed_tensors,
)
from kimi_jax.quantization.int4 import CODES_PER_WORD


def dequantize(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns code * scale, rounded to bfloat16 as the released models compute with it.

    Args:
      packed: int32 [rows, in / 8].
      scales: bfloat16 [rows, in / group size].
    """
    with _on_host():
        return np.asarray(_dequantize(packed, scales))


def quantize(values: np.ndarray, group_size: int = int4.GROUP_SIZE) -> tuple[np.ndarray, ...]:
    """Rounds rows [rows, in] as training does: absmax / 7, codes -7 to 7.

    Returns:
      Words, int32 [rows, in / 8], and scales, bfloat16 [rows, in / group_size].

    Raises:
      ValueError: groups do not divide the inputs.
    """
    with _on_host():
        packed, scales = _quantize(values, group_size=group_size)
        return np.asarray(packed), np.asarray(scales)


def _on_host():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@jax.jit
def _dequantize(packed: jax.Array, scales: jax.Array) -> jax.Array:
    shape = np.array([packed.shape[0], packed.shape[1] * CODES_PER_WORD])
    weight = from_compressed_tensors(PackedLinear(packed, scales, shape))
    return jnp.swapaxes(int4.dequantize(weight, jnp.bfloat16), 0, 1)


@functools.partial(jax.jit, static_argnames="group_size")
def _quantize(values: jax.Array, *, group_size: int) -> tuple[jax.Array, jax.Array]:
    linear = to_compressed_tensors(int4.quantize(jnp.swapaxes(values, 0, 1), group_size))
    return linear.weight_packed, linear.weight_scale
