"""A published checkpoint on disk, read by rows and columns, whatever its format."""

import os
import pathlib

import numpy as np
from absl import logging

from kimi_jax.configs.hugging_face import model_config_from_hugging_face
from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop import fp8_blocks, int4_rows
from kimi_jax.interop.fp8_blocks import BLOCK
from kimi_jax.interop.hf_formats import (
    FP8_SCALE,
    INT4_CODES,
    INT4_SCALE,
    INT4_SHAPE,
    contents,
)
from kimi_jax.interop.hf_names import HfTensor, hf_tensors
from kimi_jax.interop.safetensors_io import SafetensorsFolder
from kimi_jax.interop.tensor_source import PackedRows
from kimi_jax.quantization.int4 import CODES_PER_WORD

CONFIG_FILE = "config.json"


class HfCheckpoint:
    """A `TensorSource` over a folder in Hugging Face's form; a context manager.

    Attributes:
      path: the folder.
      config: the architecture that its config.json describes.
      contents: how each tensor is stored, and what is left out.
      files: its safetensors files.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens a folder and accounts for every tensor in it, before the first value is read.

        What is no part of the model is said in the log.

        Raises:
          ConfigError: config.json is missing, or describes another kind of model.
          CheckpointFileError: files or tensors are missing, damaged, or too many.
        """
        self.path = pathlib.Path(path)
        self.config = model_config_from_hugging_face(self.path / CONFIG_FILE)
        self.files = SafetensorsFolder(self.path)
        self._tensors = hf_tensors(self.config)
        try:
            self.contents = contents(self.config, self.files.tensors, str(self.path))
        except CheckpointFileError:
            self.files.close()
            raise
        for reason, names in self.contents.ignored.items():
            logging.warning("%s: %d tensors are left out: %s", path, len(names), reason.value)

    def __enter__(self) -> "HfCheckpoint":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.files.close()

    def form(self, name: str) -> FileFormat:
        """Returns how one tensor is stored."""
        return self.contents.forms[name]

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Returns values of rows; FP8 is dequantised to float32, INT4 to bfloat16."""
        tensor = self._tensors[name]
        columns = slice(0, tensor.shape[1]) if len(tensor.shape) > 1 else None
        return self.piece(name, rows, columns)

    def piece(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
        """Returns values of rows and columns, reading nothing else; None for a vector's columns.

        Raises:
          CheckpointFileError: a value cannot be read, or a scale is not finite.
        """
        match self.form(name):
            case FileFormat.FP8:
                return self._fp8(name, rows, columns)
            case FileFormat.INT4:
                return self._int4(self._tensors[name], rows, columns)
            case _:
                return self.files.read(self.contents.prefix + name, rows, columns)

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """Returns codes and scales of rows; None where they are not in INT4."""
        if self.form(name) is not FileFormat.INT4:
            return None
        return PackedRows(self.int4_codes(name, rows), self.int4_scales(name, rows))

    def int4_codes(self, name: str, rows: slice, words: slice | None = None) -> np.ndarray:
        """Returns int32 words of a tensor in INT4, [rows, words]; None takes all words."""
        stated = self.files.read(self.contents.prefix + name + INT4_SHAPE)
        shape = self._tensors[name].shape
        if tuple(stated) != shape:
            self._fail(name + INT4_SHAPE, f"must say {list(shape)}, but says {stated.tolist()}")
        return self.files.read(self.contents.prefix + name + INT4_CODES, rows, words)

    def int4_scales(self, name: str, rows: slice, groups: slice | None = None) -> np.ndarray:
        """Returns bfloat16 scales of a tensor in INT4, [rows, groups]; None takes all groups."""
        return self._scales(name + INT4_SCALE, rows, groups)

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None where nothing is in INT4."""
        packed = (name for name, form in self.contents.forms.items() if form is FileFormat.INT4)
        name = next(packed, None)
        return None if name is None else self._group_size(name)

    def _group_size(self, name: str) -> int:
        groups = self.files.tensors[self.contents.prefix + name + INT4_SCALE].shape[1]
        return self._tensors[name].shape[1] // groups

    def _fp8(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        codes = self.files.read(self.contents.prefix + name, rows, columns)
        blocks = (_touched(part, BLOCK) for part in (rows, columns))
        scales = self._scales(name + FP8_SCALE, *blocks)
        values = fp8_blocks.dequantize(
            codes, scales, first_row=rows.start, first_column=columns.start
        )
        if not np.all(np.isfinite(values)):
            self._fail(name, "holds a code that stands for no number")
        return values

    def _int4(self, tensor: HfTensor, rows: slice, columns: slice) -> np.ndarray:
        """Dequantises whole groups, and returns what was asked for."""
        size = self._group_size(tensor.name)
        groups = _touched(columns, size)
        words = slice(groups.start * size // CODES_PER_WORD, groups.stop * size // CODES_PER_WORD)
        codes = self.int4_codes(tensor.name, rows, words)
        values = int4_rows.dequantize(codes, self.int4_scales(tensor.name, rows, groups))
        first = columns.start - groups.start * size
        return values[:, first : first + columns.stop - columns.start]

    def _scales(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
        scales = self.files.read(self.contents.prefix + name, rows, columns)
        if not np.all(np.isfinite(scales)):
            self._fail(name, "holds a scale that is not finite")
        return scales

    def _fail(self, name: str, problem: str) -> None:
        name = self.contents.prefix + name
        raise CheckpointFileError(f"{self.path / self.files.file_of(name)}: {name} {problem}")


def _touched(part: slice, size: int) -> slice:
    """Returns the blocks of `size` that a range touches."""
    return slice(part.start // size, -(-part.stop // size))
