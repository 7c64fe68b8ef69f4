"""Arrays of an orbax checkpoint by name, without a device and without the tree they belong to."""

import os
import pathlib
import types
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.safetensors_header import DTYPES, TensorInfo

_METADATA_FILE = "_METADATA"
_CACHE_BYTES = 64 << 20  # of decoded chunks
_READS_UNDER_WAY = 4  # chunks that are read at a time: each is in memory twice meanwhile
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class OrbaxTensors:
    """The arrays of one orbax folder; nothing of them is read before `read` is called.

    Attributes:
      path: the folder.
      tensors: what it holds, by dotted path.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Reads the names, shapes and dtypes.

        Args:
          path: folder of the arrays: of a run, `checkpoints/STEP/state`.

        Raises:
          CheckpointFileError: there is no complete checkpoint in this folder.
        """
        self.path = pathlib.Path(path).absolute()
        if not (self.path / _METADATA_FILE).is_file():
            raise CheckpointFileError(f"{self.path}: is no orbax checkpoint: no {_METADATA_FILE}")
        # A chunk that holds several layers or experts is decoded once for all of them.
        self._context = tensorstore.Context(
            {
                "cache_pool": {"total_bytes_limit": _CACHE_BYTES},
                "file_io_concurrency": {"limit": _READS_UNDER_WAY},
            }
        )
        self._arrays: dict[str, tensorstore.TensorStore] = {}
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self.path).tree
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointFileError(f"{self.path}: cannot be read: {error}") from error
        self.tensors: Mapping[str, TensorInfo] = types.MappingProxyType(
            {leaf.name: self._info(leaf) for leaf in jax.tree.leaves(tree)}
        )

    def read(self, name: str, rows: slice | tuple[int, ...] | None = None) -> np.ndarray:
        """Reads a part of an array.

        Args:
          name: of the array.
          rows: which of its first dimension; or the index of a part, one number for each of its
            leading dimensions; None for all.

        Raises:
          CheckpointFileError: a file is missing or damaged.
        """
        try:
            return self._array(name)[... if rows is None else rows].read().result()
        except (ValueError, OSError) as error:
            message = f"{self.path}: tensor {name} cannot be read: {error}"
            raise CheckpointFileError(message) from error

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._arrays:
            store = {"driver": "ocdbt", "base": f"file://{self.path}", "path": f"{name}/"}
            spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
            opened = tensorstore.open(spec, open=True, read=True, context=self._context)
            self._arrays[name] = opened.result()
        return self._arrays[name]

    def _info(self, leaf: ocp.metadata.ArrayMetadata) -> TensorInfo:
        dtype = np.dtype(leaf.dtype)
        if dtype not in _NAMES:
            message = f"{self.path}: tensor {leaf.name} has the dtype {dtype}; known are "
            raise CheckpointFileError(message + ", ".join(map(str, _NAMES)))
        return TensorInfo(leaf.name, _NAMES[dtype], tuple(leaf.shape))
