"""A model as published tensors, whatever it is stored in."""

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
        self._fused: tuple[str, np.ndarray] | None = None  # the last one that was put together

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
        """Returns values of rows, in the dtype that the parameter has; bfloat16 from INT4."""
        tensor = self._tensors[name]
        if _is_packed(self._leaf(tensor.parts[0])):
            return int4_rows.dequantize(*self.int4_rows(name, rows))
        if len(tensor.parts) == 1:
            return self._published(tensor.parts[0], rows)
        fused = self._fused  # read once: several threads ask
        if fused is None or fused[0] != name:
            fused = self._fused = name, self._put_together(tensor)
        return fused[1][rows]

    def int4_rows(self, name: str, rows: slice) -> PackedRows | None:
        """Returns codes and scales of a packed model's weights."""
        part = self._tensors[name].parts[0]
        leaf = self._leaf(part)
        if not _is_packed(leaf):
            return None
        # Words and scales are laid out as the weight is: outputs last.
        index = (*part.index, slice(None), rows)
        return PackedRows(_values(leaf.codes, index).T, _values(leaf.scales, index).T)

    def _leaf(self, part: Part) -> Any:
        return self._leaves[part.path]

    def _published(self, part: Part, rows: slice) -> np.ndarray:
        """Reads rows of a tensor that is this parameter, and nothing else."""
        (out,) = part.out_dims
        index = tuple(rows if d == out else slice(None) for d in range(len(part.spec.shape)))
        values = to_published(part, _values(self._leaf(part), (*part.index, *index)))
        return values[0] if part.in_dims else values

    def _put_together(self, tensor: HfTensor) -> np.ndarray:
        parts = [to_published(p, _values(self._leaf(p), p.index)) for p in tensor.parts]
        return np.concatenate(parts, axis=1).reshape(tensor.shape)


def _is_packed(node: Any) -> bool:
    return isinstance(node, Int4Weight)


def _values(leaf: Any, index: tuple[int | slice, ...]) -> np.ndarray:
    """Returns leaf[index] on the host; of an array on devices, from the shards that hold it."""
    if not isinstance(leaf, jax.Array):
        return leaf[index]
    if not leaf.is_fully_addressable:
        raise ConfigError(
            "parameters are spread over several processes; export from one that holds all of them"
        )
    index = (*index, *(slice(None),) * (leaf.ndim - len(index)))
    wanted = [_range(i, n) for i, n in zip(index, leaf.shape, strict=True)]
    values = np.empty([len(w) for w in wanted], leaf.dtype)
    for shard in _distinct_shards(leaf):
        held = [_range(i, n) for i, n in zip(shard.index, leaf.shape, strict=True)]
        pairs = zip(wanted, held, strict=True)
        common = [range(max(w.start, h.start), min(w.stop, h.stop)) for w, h in pairs]
        values[_within(common, wanted)] = np.asarray(shard.data)[_within(common, held)]
    return values[tuple(0 if isinstance(i, int) else slice(None) for i in index)]


def _range(index: int | slice, size: int) -> range:
    return range(index, index + 1) if isinstance(index, int) else range(*index.indices(size))


def _within(parts: list[range], wholes: list[range]) -> tuple[slice, ...]:
    """Where parts of some ranges lie in them; nowhere where they are empty."""
    return tuple(
        slice(part.start - whole.start, part.stop - whole.start) if part else slice(0)
        for part, whole in zip(parts, wholes, strict=True)
    )


def _distinct_shards(leaf: jax.Array) -> Iterator[Any]:
    return (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
