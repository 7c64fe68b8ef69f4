"""Parameters in a checkpoint of this project, read a layer and an expert at a time."""

import os
from typing import Any

import numpy as np

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.core.param_spec import named_specs
from kimi_jax.interop.orbax_tensors import OrbaxTensors
from kimi_jax.interop.safetensors_header import DTYPES
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.quantization.int4 import Int4Weight

_PACKED = ("codes", "scales")  # fields of Int4Weight


class StoredArray:
    """An array on disk; indexing it with integers reads that part."""

    def __init__(self, tensors: OrbaxTensors, name: str) -> None:
        """Names the array of a checkpoint."""
        self._tensors, self._name = tensors, name
        info = tensors.tensors[name]
        self.shape, self.dtype = info.shape, DTYPES[info.dtype]

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        return self._tensors.read(self._name, index)


def stored_parameters(
    folder: str | os.PathLike, config: ModelConfig, *, prefix: str = ""
) -> ParameterSource:
    """Opens the parameters of a checkpoint without reading them.

    Args:
      folder: what orbax has written, such as `checkpoints/STEP/state` of a run.
      config: the architecture.
      prefix: what stands before the names of parameters, such as `params.`.

    Raises:
      CheckpointFileError: a parameter is missing, or has another shape.
    """
    tensors = OrbaxTensors(folder)
    leaves: dict[str, Any] = {}
    for path, spec in named_specs(transformer.specs(config)):
        leaf = _leaf(tensors, prefix + path)
        if leaf is None or leaf.shape != spec.shape:
            given = "is missing" if leaf is None else f"is {list(leaf.shape)}"
            raise CheckpointFileError(
                f"{tensors.path}: {prefix}{path} must be {list(spec.shape)}, but {given}"
            )
        leaves[path] = leaf
    return ParameterSource(leaves, config)


def _leaf(tensors: OrbaxTensors, name: str) -> StoredArray | Int4Weight | None:
    if name in tensors.tensors:
        return StoredArray(tensors, name)
    parts = [f"{name}.{part}" for part in _PACKED]
    if all(part in tensors.tensors for part in parts):
        return Int4Weight(*(StoredArray(tensors, part) for part in parts))
    return None
