"""Which mesh axes split which logical axes: one table for storage, one for computing.

In storage everything large is split over the whole mesh but its replicas. For computing, a layer's
weights are gathered, except for routed experts, which stay on the devices that own them, and for
what the tensor axis, or in attention the heads' share of the context axis, keeps apart.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kimi_jax.core import axes as ax
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import NORM, SELECTION_BIAS, ParamSpec, map_specs
from kimi_jax.parallel.mesh import CONTEXT, DATA, EXPERT, PIPE, SEQUENCE_AXES, TENSOR

RuleTable = Mapping[str, tuple[str, ...]]

# Heads are split over tensor first: the heads that a group of the context axis exchanges for
# positions are then consecutive, as w_out's are.
_HEADS = (TENSOR, CONTEXT)
_FSDP = (DATA, EXPERT, TENSOR, CONTEXT, PIPE)

# In both, earlier rows are served first.
STORAGE: RuleTable = {
    ax.EXPERTS: (EXPERT,),
    ax.HEADS: _HEADS,
    ax.HEAD_OUTPUTS: (TENSOR,),
    ax.FFN: (TENSOR,),
    ax.EXPERT_FFN: (TENSOR,),
    ax.VOCAB: (TENSOR,),
    ax.EMBED: _FSDP,
    ax.Q_LATENT: _FSDP,
    ax.KV_LATENT: _FSDP,
}
COMPUTE: RuleTable = {
    ax.EXPERTS: (EXPERT,),
    ax.HEADS: _HEADS,
    ax.HEAD_OUTPUTS: (TENSOR,),
    ax.FFN: (TENSOR,),
    ax.EXPERT_FFN: (TENSOR,),
    ax.VOCAB: (TENSOR,),
}

# Layouts of activations. The residual stream is TOKENS.
TOKENS = PartitionSpec(SEQUENCE_AXES, CONTEXT)  # [B, T, ...]
BATCH = PartitionSpec(SEQUENCE_AXES)  # [B, ...], every position on each device
HEADS = PartitionSpec(SEQUENCE_AXES, None, _HEADS)  # [B, T, N, ...], heads split
HEAD_MAXIMA = PartitionSpec(SEQUENCE_AXES, _HEADS)  # [B, N]
HEAD_OUTPUTS = PartitionSpec(SEQUENCE_AXES, CONTEXT, TENSOR)  # [B, T, N, ...], positions split
PARTIAL_TOKENS = PartitionSpec(TENSOR, *TOKENS)  # [tensor, B, T, ...], to be added up
TOKEN_SHARDS = PartitionSpec((*SEQUENCE_AXES, CONTEXT))  # [shards, ...], a row from each shard
REPLICATED = PartitionSpec()

_KEPT_WHOLE = frozenset({NORM, SELECTION_BIAS})  # vectors, cheaper to keep than to gather


def partition_spec(
    spec: ParamSpec, table: RuleTable, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """Lays one parameter out on the mesh.

    Dimensions are served in the order of the table's rows. Each takes the mesh axes its logical
    axis may have, as far as they are still free and divide what is left of its size; an axis that
    does not divide leaves the dimension whole. Vectors are kept whole on every device. Axes of size
    1 are not named: layouts that are the same look the same.

    Raises:
      ConfigError: the table names an axis that the mesh does not have, or names one twice.
    """
    if spec.kind in _KEPT_WHOLE:
        return REPLICATED
    rows = list(table)
    served = sorted(
        (dim for dim, name in enumerate(spec.axes) if name in table),
        key=lambda dim: rows.index(spec.axes[dim]),
    )
    free = {name for name, size in axis_sizes.items() if size > 1}
    entries = [None] * len(spec.shape)
    for dim in served:
        wanted = table[spec.axes[dim]]
        _check_row(spec.axes[dim], wanted, axis_sizes)
        taken = []
        for mesh_axis in wanted:
            shards = math.prod(axis_sizes[a] for a in (*taken, mesh_axis))
            if mesh_axis in free and spec.shape[dim] % shards == 0:
                taken.append(mesh_axis)
                free.remove(mesh_axis)
        entries[dim] = tuple(taken) if len(taken) > 1 else (taken[0] if taken else None)
    return PartitionSpec(*entries)


def reshard(x: jax.Array, layout: PartitionSpec) -> jax.Array:
    """Redistributes x over the mesh axes of the layout that are not manual where this is called."""
    return jax.reshard(x, here(layout))


def here(layout: PartitionSpec) -> PartitionSpec:
    """Leaves out mesh axes that are manual where this is called.

    In a replica that is the replica axis, in a pipeline's stage the pipe axis.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    return without(layout, manual) if manual else layout


def without(layout: PartitionSpec, names: Collection[str]) -> PartitionSpec:
    """Returns the layout with some mesh axes left out."""
    kept = (tuple(n for n in entry_axes(entry) if n not in names) for entry in layout)
    return PartitionSpec(*(axes or None for axes in kept))


def entry_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names the mesh axes that split one dimension of a layout, the slowest first."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def partition_specs(plan: Any, table: RuleTable) -> Any:
    """Lays every parameter of a plan out on the current mesh."""
    axis_sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return map_specs(lambda spec: partition_spec(spec, table, axis_sizes), plan)


def _check_row(name: str, wanted: tuple[str, ...], axis_sizes: Mapping[str, int]) -> None:
    unknown = [axis for axis in wanted if axis not in axis_sizes]
    require(
        not unknown,
        f"the rule for {name!r} names the mesh axes {unknown}; the mesh has {list(axis_sizes)}",
    )
    require(
        len(set(wanted)) == len(wanted),
        f"the rule for {name!r} names a mesh axis twice: {wanted}; an axis splits a dimension once",
    )
