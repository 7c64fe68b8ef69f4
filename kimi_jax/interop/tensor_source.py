"""A model as published tensors, whatever it is stored in."""

from typing import NamedTuple, Protocol

import numpy as np

from kimi_jax.configs.model import ModelConfig


class PackedRows(NamedTuple):
    """Rows of a weight in INT4, in the layout of compressed-tensors."""

    packed: np.ndarray  # int32 [rows, in / 8], nibble = code + 8
    scales: np.ndarray  # bfloat16 [rows, in / 32]


class TensorSource(Protocol):
    """A model as published tensors."""

    config: ModelConfig

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Returns rows of the published tensor `name`, [rows, in] or [rows], exactly."""

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """Returns rows as they are held; None where the tensor is not held in INT4."""
