"""Turns a model's values into what stands in the files of a format, a block of rows at a time."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop import fp8_blocks, int4_rows
from kimi_jax.interop.ahead import AHEAD, THREADS, in_order
from kimi_jax.interop.hf_formats import (
    FP8_SCALE,
    INT4_CODES,
    INT4_SCALE,
    INT4_SHAPE,
    stored_as,
)
from kimi_jax.interop.hf_names import HfTensor
from kimi_jax.interop.tensor_source import TensorSource

BLOCK_BYTES = 16 << 20  # of a block of rows in float32
# What a process needs at most: itself, with JAX; and for each value of a block that is under way
# its float32, the same once more while it is rounded, what was read and what will be written.
_PROGRAM_BYTES = 600 << 20
_BYTES_A_VALUE = 4 * 4
_IN_ORDER = ("", INT4_CODES)  # suffixes of what is written block by block

Arrays = dict[str, np.ndarray]  # by what is appended to the tensor's name


class Encoder(NamedTuple):
    """Reads from a source and converts.

    Attributes:
      source: the model.
      form: format of the files. What the source holds in INT4 is kept as it is.
      group_size: of INT4.
    """

    source: TensorSource
    form: FileFormat
    group_size: int

    def arrays(self, tensors: Iterable[HfTensor]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names and rows of all that stands in the files for some tensors, in order.

        The codes of a tensor come first, in blocks of rows, and its scales after them. The next
        blocks are read and converted meanwhile.
        """
        scales: dict[str, list[np.ndarray]] = {}
        tasks = ((tensor, rows) for tensor in tensors for rows in row_blocks(tensor))
        with contextlib.closing(in_order(self.encode, tasks)) as blocks:
            for (tensor, rows), arrays in blocks:
                for suffix, array in arrays.items():
                    if suffix in _IN_ORDER:
                        yield tensor.name + suffix, array
                    else:
                        scales.setdefault(suffix, []).append(array)
                if rows.stop == tensor.shape[0]:
                    for suffix, pieces in scales.items():
                        yield tensor.name + suffix, np.concatenate(pieces)
                    scales.clear()

    def encode(self, tensor: HfTensor, rows: slice) -> Arrays:
        """Returns what stands in the files for rows of a tensor; they begin with a block of FP8."""
        name = tensor.name
        match stored_as(tensor, self.form):
            case FileFormat.FP8:
                codes, scales = fp8_blocks.quantize(self._finite_rows(name, rows))
                return {"": codes, FP8_SCALE: scales}
            case FileFormat.INT4:
                packed = self.source.int4_rows(name, rows)
                if packed is None:
                    packed = int4_rows.quantize(self._finite_rows(name, rows), self.group_size)
                arrays = dict(zip((INT4_CODES, INT4_SCALE), packed, strict=True))
                is_last = rows.stop == tensor.shape[0]
                return arrays | ({INT4_SHAPE: np.array(tensor.shape)} if is_last else {})
            case _:
                dtype = np.float32 if tensor.is_selection_bias else ml_dtypes.bfloat16
                return {"": self.source.rows(name, rows).astype(dtype)}

    def _finite_rows(self, name: str, rows: slice) -> np.ndarray:
        values = self.source.rows(name, rows)
        if not np.all(np.isfinite(values)):
            raise CheckpointFileError(
                f"{name} of the source holds a value that is not finite, which {self.form.value} "
                "cannot store"
            )
        return values


def row_blocks(tensor: HfTensor) -> Iterator[slice]:
    """Cuts the rows of a tensor into pieces of some MiB, whole blocks of FP8 each."""
    num_rows = tensor.shape[0]
    row_bytes = 4 * (tensor.shape[1] if len(tensor.shape) > 1 else 1)
    step = max(1, BLOCK_BYTES // (row_bytes * fp8_blocks.BLOCK)) * fp8_blocks.BLOCK
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def peak_bytes(tensors: Iterable[HfTensor]) -> int:
    """Returns an upper bound of the memory that a conversion of these tensors takes."""
    values = max(next(row_blocks(t)).stop * math.prod(t.shape[1:]) for t in tensors)
    return _PROGRAM_BYTES + (AHEAD + THREADS + 1) * values * _BYTES_A_VALUE
