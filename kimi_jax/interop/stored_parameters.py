"""Parameters in a checkpoint of this project, read a layer and an expert at a time."""

import os
import pathlib
from typing import Any

import numpy as np
import tensorstore

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.core.param_spec import named_specs
from kimi_jax.interop.tensor_source import ParameterSource
from kimi_jax.model import transformer
from kimi_jax.quantization.int4 import Int4Weight

# Chunks that are kept decoded, because a chunk holds several layers or experts.
_CACHE_BYTES = 256 << 20
_PACKED = ("codes", "scales")  # fields of Int4Weight


class StoredArray:
    """An array on disk; indexing it with integers reads that part."""

    def __init__(self, store: tensorstore.TensorStore) -> None:
        """Wraps an open array."""
        self._store = store
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        return self._store[index].read().result()


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
    folder = pathlib.Path(folder).absolute()
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    leaves: dict[str, Any] = {}
    for path, spec in named_specs(transformer.specs(config)):
        leaf = _open(folder, prefix + path, context)
        if leaf is None:
            parts = [_open(folder, f"{prefix}{path}.{part}", context) for part in _PACKED]
            leaf = None if None in parts else Int4Weight(*parts)
        if leaf is None or leaf.shape != spec.shape:
            given = "is missing" if leaf is None else f"is {list(leaf.shape)}"
            raise CheckpointFileError(
                f"{folder}: {prefix}{path} must be {list(spec.shape)}, but {given}"
            )
        leaves[path] = leaf
    return ParameterSource(leaves, config)


def _open(folder: pathlib.Path, name: str, context: tensorstore.Context) -> StoredArray | None:
    """Returns None where there is no such array."""
    store = {"driver": "ocdbt", "base": folder.as_uri() + "/", "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
    try:
        opened = tensorstore.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:
        if "NOT_FOUND" not in str(error):
            raise CheckpointFileError(f"{folder}: {name} cannot be read: {error}") from error
        return None
    return StoredArray(opened)
