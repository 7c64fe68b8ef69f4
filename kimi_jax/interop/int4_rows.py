"""Rows of INT4 matrices in NumPy, in the layout of compressed-tensors' pack-quantized."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kimi_jax.quantization import int4
from kimi_jax.quantization.compressed_tensors import to_compressed_tensors

_OFFSET = 8  # a nibble holds code + 8
_NIBBLES = np.arange(256, dtype=np.uint8)
# What the two nibbles of a byte stand for, the lower one first.
_CODES = np.stack([_NIBBLES & 15, _NIBBLES >> 4], axis=-1).astype(np.float32) - _OFFSET


def codes(packed: np.ndarray) -> np.ndarray:
    """Returns the codes, -8 to 7, of int32 words [rows, in / 8], as float32 [rows, in]."""
    octets = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    return _CODES[octets].reshape(packed.shape[0], -1)


def dequantize(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns code * scale, rounded to bfloat16 as the released models compute with it.

    Args:
      packed: int32 [rows, in / 8].
      scales: bfloat16 [rows, in / group size].
    """
    values = codes(packed)
    groups = values.reshape(*scales.shape, -1)
    groups *= scales.astype(np.float32)[..., None]
    return values.astype(ml_dtypes.bfloat16)


def quantize(values: np.ndarray, group_size: int = int4.GROUP_SIZE) -> tuple[np.ndarray, ...]:
    """Rounds rows [rows, in] as training does: absmax / 7, codes -7 to 7.

    Returns:
      Words, int32 [rows, in / 8], and scales, bfloat16 [rows, in / group_size].

    Raises:
      ValueError: groups do not divide the inputs.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        packed, scales = _quantize(values, group_size=group_size)
        return np.asarray(packed), np.asarray(scales)


@functools.partial(jax.jit, static_argnames="group_size")
def _quantize(values: jax.Array, *, group_size: int) -> tuple[jax.Array, jax.Array]:
    linear = to_compressed_tensors(int4.quantize(jnp.swapaxes(values, 0, 1), group_size))
    return linear.weight_packed, linear.weight_scale
