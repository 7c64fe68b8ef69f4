"""A model as published tensors, whatever it is stored in."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from kimi_jax.configs.model import ModelConfig
from kimi_jax.core.errors import ConfigError
from kimi_jax.core.trees import leaf_names
from kimi_jax.interop import int4_rows
from kimi_jax.interop.hf_names import HfTensor, Part, hf_tensors, to_published
from kimi_jax.model.transformer import TransformerParams
from kimi_jax.quantization.int4 import Int4Weight


class PackedRows(NamedTuple):
    """Rows of a matrix in INT4, as compressed-tensors lays them out."""

    packed: np.ndarray  # int32 [rows, in / 8]: the lowest nibble holds the first code + 8
    scales: np.ndarray  # bfloat16 [rows, in / group size]


@runtime_checkable  # for the checks of types in tests
class TensorSource(Protocol):
    """Where a conversion reads from, rows at a time, so that no tensor needs to be held whole."""

    config: ModelConfig

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None where nothing is in INT4."""
        ...

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Returns values of rows of a published tensor, [rows, in] or [rows].

        Args:
          name: of `hf_tensors(config)`, whatever the tensor is stored as.
          rows: a range of the first dimension.

        Returns:
          The exact values, in bfloat16 or float32.
        """
        ...

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """Returns codes and scales as they are stored; None where they are not in INT4."""
        ...


class ParameterSource:
    """A `TensorSource` over parameters: masters, weights in any dtype, or a packed model."""

    def __init__(self, leaves: Mapping[str, Any], config: ModelConfig) -> None:
        """Wraps parameters.

        Args:
          leaves: by their dotted names: arrays, or whatever has their shape and dtype and yields
            NumPy arrays when it is indexed by integers; or an `Int4Weight` of two of them.
          config: the architecture.
        """
        self.config = config
        self._leaves = leaves
        self._tensors = hf_tensors(config)
        self._lock = threading.Lock()
        self._latest: tuple[str, np.ndarray] | None = None  # a tensor that was put together

    @classmethod
    def of(cls, params: TransformerParams, config: ModelConfig) -> "ParameterSource":
        """Wraps parameters in memory; all of them are on devices of this process."""
        names = jax.tree.leaves(leaf_names(params, is_leaf=_is_packed))
        leaves = jax.tree.leaves(params, is_leaf=_is_packed)
        return cls(dict(zip(names, leaves, strict=True)), config)

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None where nothing is in INT4."""
        sizes = (leaf.group_size for leaf in self._leaves.values() if _is_packed(leaf))
        return next(sizes, None)

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Returns values of rows, in the dtype that the parameter has; bfloat16 from INT4.

        The whole tensor is put together once, and kept until another one is asked for.
        """
        with self._lock:  # several threads ask for rows of the same tensor
            latest = self._latest
            if latest is None or latest[0] != name:
                self._latest = None  # so that two are never held
                latest = self._latest = name, self._put_together(self._tensors[name])
        return latest[1][rows].copy()  # a view would keep the whole tensor

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """Returns codes and scales of a packed model's weights."""
        part, *others = self._tensors[name].parts
        leaf = self._leaves[part.path]
        if others or not _is_packed(leaf):
            return None
        # Words and scales are laid out as the weight is: outputs last.
        packed = _values(leaf.codes, part.index).T[rows]
        return PackedRows(packed, _values(leaf.scales, part.index).T[rows])

    def _put_together(self, tensor: HfTensor) -> np.ndarray:
        parts = [to_published(part, self._values(part)) for part in tensor.parts]
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return joined.reshape(tensor.shape)

    def _values(self, part: Part) -> np.ndarray:
        leaf = self._leaves[part.path]
        if not _is_packed(leaf):
            return _values(leaf, part.index)
        codes, scales = (_values(array, part.index).T for array in (leaf.codes, leaf.scales))
        return int4_rows.dequantize(codes, scales).T


def _is_packed(node: Any) -> bool:
    return isinstance(node, Int4Weight)


def _values(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """Returns leaf[index] on the host, from the shards that hold it."""
    if not isinstance(leaf, jax.Array):
        return leaf[index]
    if not leaf.is_fully_addressable:
        raise ConfigError(
            "parameters are spread over several processes; export from one that holds all of them"
        )
    values = np.empty(leaf.shape[len(index) :], leaf.dtype)
    for shard in _distinct_shards(leaf):
        bounds = [piece.indices(n) for piece, n in zip(shard.index, leaf.shape, strict=True)]
        stacked, rest = bounds[: len(index)], bounds[len(index) :]
        if all(start <= i < stop for i, (start, stop, _) in zip(index, stacked, strict=True)):
            local = tuple(i - start for i, (start, _, _) in zip(index, stacked, strict=True))
            values[tuple(slice(*bound) for bound in rest)] = np.asarray(shard.data[local])
    return values


def _distinct_shards(leaf: jax.Array) -> Iterator[Any]:
    return (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
