"""Rounds published tensors to the formats of a GGUF file, a block of rows at a time."""

import dataclasses
import enum
import types
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop.gguf_layout import GgufTensor, Piece, Role
from kimi_jax.interop.tensor_source import PackedRows, TensorSource

BLOCK_VALUES = 1 << 22
_ROW_MULTIPLE = 128  # rows that share scales in FP8 checkpoints
_GROUP = 32


class GgufType(enum.Enum):
    """Formats of weights; norms, selection biases and routers are float32 in each.

    Q8_0 has 8-bit codes with a scale for 32 inputs, and float16 for matrices whose inputs are no
    multiple of 32. Q4_0 holds the INT4 codes and scales of routed experts as they are; everything
    else is bfloat16.
    """

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


_LARGEST_HALF = 65504.0
_LARGEST = {GgufType.F16: _LARGEST_HALF, GgufType.Q8_0: 127 * _LARGEST_HALF}


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file, its format and its size."""

    tensor: GgufTensor
    stored: GgufType
    num_bytes: int


def gguf_package() -> types.ModuleType:
    """Imports the package that knows the format.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "writing GGUF files needs the package gguf: pip install 'kimi_jax[gguf]'"
        ) from error
    return gguf


def stored_type(tensor: GgufTensor, weight_type: GgufType) -> GgufType:
    """Returns the format of a tensor in a file whose weights are `weight_type`."""
    if tensor.role is Role.SMALL:
        return GgufType.F32
    if weight_type is GgufType.Q4_0:
        return GgufType.Q4_0 if tensor.role is Role.ROUTED_EXPERT else GgufType.BF16
    if weight_type is GgufType.Q8_0 and tensor.shape[-1] % _GROUP:
        return GgufType.F16
    return weight_type


def row_blocks(tensor: GgufTensor, piece: Piece) -> Iterator[slice]:
    """Cuts a piece into rows that fit into memory; a transposed one is small."""
    count = piece.rows.stop - piece.rows.start
    if not piece.transposed:
        count = max(BLOCK_VALUES // tensor.shape[-1], 1)
        count = max(count // _ROW_MULTIPLE * _ROW_MULTIPLE, min(count, _ROW_MULTIPLE))
    for start in range(piece.rows.start, piece.rows.stop, count):
        yield slice(start, min(start + count, piece.rows.stop))


def encode(source: TensorSource, entry: PlannedTensor, piece: Piece, rows: slice) -> np.ndarray:
    """Returns rows of a published tensor as the file holds them.

    Raises:
      CheckpointFileError: they have another shape, or values that the format does not hold.
    """
    shape = entry.tensor.shape
    if entry.stored is GgufType.Q4_0:
        packed = source.int4_rows(piece.name, rows)
        return int4_blocks(packed, piece.name, (rows.stop - rows.start, shape[-1]))
    values = source.rows(piece.name, rows)
    inputs = shape[-2:-1] if piece.transposed else shape[1:][-1:]
    expected = (rows.stop - rows.start, *inputs)
    if values.shape != expected:
        raise CheckpointFileError(
            f"rows {rows.start} to {rows.stop} of {piece.name} have the shape "
            f"{list(values.shape)}, and should have {list(expected)}"
        )
    values = np.ascontiguousarray(values.T) if piece.transposed else values
    return _convert(values, entry.stored, piece.name)


def _convert(values: np.ndarray, stored: GgufType, name: str) -> np.ndarray:
    """Rounds values to a format.

    Raises:
      CheckpointFileError: one is too large for the format, or is no number.
    """
    if stored is GgufType.BF16:
        return values.astype(ml_dtypes.bfloat16, copy=False)
    values = values.astype(np.float32, copy=False)
    if stored is GgufType.F32:
        return values
    largest = max(values.max(), -values.min())  # NaN where there is one
    if not largest <= _LARGEST[stored]:
        raise CheckpointFileError(
            f"{name} has a value of size {largest:g}, and {stored.value} holds sizes up to "
            f"{_LARGEST[stored]:g}; choose bf16 or f32, if it is a number at all"
        )
    if stored is GgufType.F16:
        return values.astype(np.float16)
    return gguf_package().quants.quantize(values, gguf_package().GGMLQuantizationType.Q8_0)


def int4_blocks(packed: PackedRows | None, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Lays INT4 rows out as blocks of Q4_0, codes and scales unchanged.

    Both hold code + 8 in a nibble and multiply code by scale. A block has the scale of 32 inputs
    as float16, then 16 bytes: input i in the low nibble of byte i, input i + 16 in the high one.
    float16 has every bfloat16 number from 2^-17, which is less than the smallest scale of
    quantisation, 1e-5, to 65280.

    Args:
      packed: rows in the order of compressed-tensors; None where the tensor is not INT4.
      name: of the published tensor.
      shape: rows and inputs that there should be.

    Returns:
      uint8 [rows, inputs / 32 * 18].

    Raises:
      CheckpointFileError: the rows have another shape, or a scale that float16 does not have.
    """
    rows, inputs = shape
    if packed is None:
        raise CheckpointFileError(
            f"{name} is not held in INT4, unlike other routed experts; export q8_0 or bf16"
        )
    words, scales = packed
    if words.shape != (rows, inputs // 8) or scales.shape != (rows, inputs // _GROUP):
        raise CheckpointFileError(
            f"{name} has codes {list(words.shape)} and scales {list(scales.shape)}; q4_0 needs "
            f"[{rows}, {inputs // 8}] and [{rows}, {inputs // _GROUP}], groups of {_GROUP}"
        )
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    inexact = (half.astype(np.float32) != scales.astype(np.float32)) | ~np.isfinite(half)
    if inexact.any():
        raise CheckpointFileError(
            f"{name} has the scale {float(scales[inexact][0]):g}, which float16 does not have: "
            "q4_0 would change its weights; export q8_0 or bf16"
        )
    # Bytes in the published order hold inputs 2 b and 2 b + 1.
    pairs = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1, 2, 8)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    blocks = np.empty((rows, inputs // _GROUP, 18), np.uint8)
    blocks[..., :2] = half.astype("<f2")[..., None].view(np.uint8)
    blocks[..., 2::2] = (first & 0x0F) | (second << 4)
    blocks[..., 3::2] = (first >> 4) | (second & 0xF0)
    return blocks.reshape(rows, -1)
