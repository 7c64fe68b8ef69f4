"""Which mesh axes split which logical axes: one table for storage, one for computing.

In storage everything large is split over the whole mesh. For computing, a layer's weights are
gathered whole, except routed experts, which stay on the devices that own them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kimi_jax.core import axes as ax
from kimi_jax.core.param_spec import NORM, SELECTION_BIAS, ParamSpec, map_specs
from kimi_jax.parallel.mesh import DATA, EXPERT

BATCH = PartitionSpec((DATA, EXPERT))  # the first axis of every activation
REPLICATED = PartitionSpec()

RuleTable = Mapping[str, tuple[str, ...]]

STORAGE: RuleTable = {
    ax.EXPERTS: (EXPERT,),
    ax.EMBED: (DATA, EXPERT),
    ax.Q_LATENT: (DATA, EXPERT),
    ax.KV_LATENT: (DATA, EXPERT),
}
COMPUTE: RuleTable = {ax.EXPERTS: (EXPERT,)}

_KEPT_WHOLE = frozenset({NORM, SELECTION_BIAS})  # vectors, cheaper to keep than to gather


def partition_spec(
    spec: ParamSpec, table: RuleTable, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """Lays one parameter out on the mesh.

    Dimensions are served in order. Each takes the mesh axes its logical axis may have, as far as
    they are still free and divide what is left of its size; an axis that does not divide leaves the
    dimension whole. Vectors are kept whole on every device.
    """
    if spec.kind in _KEPT_WHOLE:
        return REPLICATED
    free = set(axis_sizes)
    entries = []
    for name, size in zip(spec.axes, spec.shape, strict=True):
        taken = []
        for mesh_axis in table.get(name, ()):
            shards = math.prod(axis_sizes[a] for a in (*taken, mesh_axis))
            if mesh_axis in free and size % shards == 0:
                taken.append(mesh_axis)
                free.remove(mesh_axis)
        entries.append(tuple(taken) if len(taken) > 1 else (taken[0] if taken else None))
    return PartitionSpec(*entries)


def partition_specs(plan: Any, table: RuleTable) -> Any:
    """Lays every parameter of a plan out on the current mesh."""
    axis_sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return map_specs(lambda spec: partition_spec(spec, table, axis_sizes), plan)
