"""Declares parameters before they exist.

A model part returns its parameter dataclass filled with `ParamSpec`s, the plan. Initial values,
placement, optimizer labels, checkpoint layout, parameter counts and cost tables are maps over that
one tree; nothing else knows the shape of a parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kimi_jax.core import axes as ax

Leaf = Any  # one slot of a parameter tree: an array, a ParamSpec, a PartitionSpec, a label, ...

# Tags say what a parameter is. Each spec has exactly one of the first five, its kind.
MATRIX = "matrix"
EMBEDDING = "embedding"
HEAD = "head"
NORM = "norm"
SELECTION_BIAS = "selection_bias"  # moved by the load-balancing rule, never by a gradient
KINDS = frozenset({MATRIX, EMBEDDING, HEAD, NORM, SELECTION_BIAS})
ROUTED_EXPERT = "routed_expert"
ROUTER = "router"
QUERY_NOPE = "query_nope"  # these three are what QK-clip scales, along their axis `heads`
QUERY_ROPE = "query_rope"
KEY_NOPE = "key_nope"

Initializer = Callable[..., jax.Array]  # (key, shape, dtype, out_sharding=) -> array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """Shape, logical axes, initialiser and tags of one parameter.

    Attributes:
      shape: size of each dimension.
      axes: logical name of each dimension, from `core.axes`.
      init: `init(key, shape, dtype, out_sharding=...)`, as in `jax.nn.initializers`.
      tags: what the parameter is; one of `KINDS`, and more.
      inputs: for a matrix, the axes it contracts with its input (its rows); its other axes, except
        layers and experts, are its outputs (its columns).
      fused_with: for a matrix that published checkpoints store side by side with others as columns
        of one matrix, the name of that matrix.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    tags: frozenset[str]
    inputs: tuple[str, ...] = ()
    fused_with: str | None = None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)
        assert len(self.tags & KINDS) == 1, self.tags
        assert set(self.inputs) <= set(self.axes), (self.inputs, self.axes)
        assert bool(self.inputs) == (MATRIX in self.tags), self.tags

    @property
    def kind(self) -> str:
        """The one tag of `KINDS` that this parameter has."""
        (kind,) = self.tags & KINDS
        return kind

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def is_spec(leaf: Any) -> bool:
    """True for a `ParamSpec`; for `is_leaf=`."""
    return isinstance(leaf, ParamSpec)


def map_specs(fn: Callable[..., Any], plan: Any, *trees: Any) -> Any:
    """Applies `fn(spec, *leaves)` to each spec and the leaves of `trees` in its place."""
    return jax.tree.map(fn, plan, *trees, is_leaf=is_spec)


def named_specs(plan: Any) -> Iterator[tuple[str, ParamSpec]]:
    """Yields (path, spec), the path written like `moe_blocks.attention.w_q_down`."""
    for path, spec in jax.tree.leaves_with_path(plan, is_leaf=is_spec):
        yield jax.tree_util.keystr(path, simple=True, separator="."), spec


def stack(plan: Any, num_layers: int) -> Any:
    """Turns the plan of one block into that of `num_layers` stacked ones."""

    def add_layers(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(
            spec, shape=(num_layers, *spec.shape), axes=(ax.LAYERS, *spec.axes)
        )

    return map_specs(add_layers, plan)


def count_parameters(plan: Any) -> int:
    """Number of values in a plan, exactly (a Python integer)."""
    return sum(spec.size for _, spec in named_specs(plan))
