"""What Muon treats as one matrix: which leaves, or which parts of them, and in which shape."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.configs.optimizer import MatrixGranularity
from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import MATRIX, ROUTED_EXPERT, ParamSpec, named_specs


@dataclasses.dataclass(frozen=True)
class _Member:
    """One leaf of a view: where it is in the tree, and how its dimensions are read.

    Attributes:
      name: path of the leaf.
      index: position of the leaf among the leaves of the plan.
      stack: dimensions along which it is a stack of matrices.
      rows: dimensions that together are the rows, the inputs.
      columns: dimensions that together are the columns, the outputs.
      shape: shape of the leaf.
    """

    name: str
    index: int
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shape: tuple[int, ...]

    def sizes(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in dims)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A stack of matrices, each made of one leaf or of several leaves side by side.

    Attributes:
      members: the leaves, from the first column to the last.
    """

    members: tuple[_Member, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the leaves."""
        return tuple(member.name for member in self.members)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the leading dimensions: layers, experts, heads; (1,) for a single matrix."""
        first = self.members[0]
        return first.sizes(first.stack) or (1,)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows n and columns m of each matrix."""
        rows = math.prod(self.members[0].sizes(self.members[0].rows))
        return rows, sum(math.prod(member.sizes(member.columns)) for member in self.members)

    def to_stacks(self, leaves: list[Any]) -> list[jax.Array]:
        """Picks this view's leaves out of all, each as [*stack, *rows, *columns]."""
        stacks = []
        for m in self.members:
            stack = jnp.transpose(leaves[m.index], m.stack + m.rows + m.columns)
            stacks.append(stack if m.stack else stack[None])
        return stacks

    def from_stacks(self, stacks: list[jax.Array]) -> dict[int, jax.Array]:
        """Undoes `to_stacks`: leaves by their position in the tree."""
        leaves = {}
        for m, stack in zip(self.members, stacks, strict=True):
            values = stack if m.stack else stack[0]
            leaves[m.index] = jnp.transpose(values, _inverse(m.stack + m.rows + m.columns))
        return leaves

    def join(self, items: list[jax.Array]) -> jax.Array:
        """Makes one matrix [n, m] of one item, [*rows, *columns], of each leaf."""
        rows = self.matrix_shape[0]
        return jnp.concatenate([item.reshape(rows, -1) for item in items], axis=1)

    def split(self, matrix: jax.Array) -> list[jax.Array]:
        """Undoes `join`."""
        items, start = [], 0
        for m in self.members:
            width = math.prod(m.sizes(m.columns))
            part = jax.lax.slice_in_dim(matrix, start, start + width, axis=1)
            items.append(part.reshape(m.sizes(m.rows + m.columns)))
            start += width
        return items


def matrix_views(plan: Any, granularity: MatrixGranularity) -> tuple[MatrixView, ...]:
    """Divides the matrices of a plan, and nothing else of it, into views.

    Args:
      plan: tree of `ParamSpec`s.
      granularity: ROLE takes every leaf as one matrix per layer and expert; FUSED puts leaves of
        one layer that name the same `fused_with` side by side; HEAD is ROLE with every head of the
        query, key and value projections apart. The output projection stays whole even there: its
        heads are rows, inputs whose contributions are summed into one and the same output, whereas
        each head of the others writes an output that no other head sees.

    Returns:
      Views in the order of their first leaves; each matrix leaf is in exactly one.
    """
    groups: dict[tuple[str, str], list[_Member]] = {}
    for index, (name, spec) in enumerate(named_specs(plan)):
        if spec.kind != MATRIX:
            continue
        key = (name, "")
        if granularity is MatrixGranularity.FUSED and spec.fused_with is not None:
            key = (name.rpartition(".")[0], spec.fused_with)
        groups.setdefault(key, []).append(_member(name, index, spec, granularity))
    views = tuple(MatrixView(tuple(members)) for members in groups.values())
    for view in views:
        assert len({(m.sizes(m.stack), m.sizes(m.rows)) for m in view.members}) == 1, view
    return views


def count_matrices(view: MatrixView) -> int:
    """Number of matrices in a view."""
    return math.prod(view.stack_shape)


def _member(name: str, index: int, spec: ParamSpec, granularity: MatrixGranularity) -> _Member:
    # To a router, experts are outputs, the columns of its matrix.
    stack_axes = {ax.LAYERS} | ({ax.EXPERTS} if ROUTED_EXPERT in spec.tags else set())
    if granularity is MatrixGranularity.HEAD and ax.HEADS not in spec.inputs:
        stack_axes.add(ax.HEADS)
    dims = {"stack": [], "rows": [], "columns": []}
    for dim, axis in enumerate(spec.axes):
        part = "stack" if axis in stack_axes else "rows" if axis in spec.inputs else "columns"
        dims[part].append(dim)
    return _Member(
        name=name,
        index=index,
        shape=spec.shape,
        **{part: tuple(numbers) for part, numbers in dims.items()},
    )


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(permutation.index(dim) for dim in range(len(permutation)))
