"""Puts parameters on the mesh, and brings a layer's weights together when it computes."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.core import precision
from kimi_jax.core.param_spec import EMBEDDING, HEAD, MATRIX, ROUTER, ParamSpec, is_spec, map_specs
from kimi_jax.core.platform import target_platform
from kimi_jax.core.rng import key_for
from kimi_jax.core.trees import leaf_names
from kimi_jax.parallel import rules

_ROUNDED_KINDS = frozenset({MATRIX, EMBEDDING, HEAD})


def initialize(key: jax.Array, plan: Any) -> Any:
    """Creates float32 parameters in their storage layout.

    Each leaf's key comes from its name, so that its values depend neither on the mesh nor on other
    leaves. Call it under `jax.jit`: one program instead of one per leaf.
    """
    names = leaf_names(plan, is_leaf=is_spec)
    layouts = rules.partition_specs(plan, rules.STORAGE)

    def create(spec: ParamSpec, name: str, layout: PartitionSpec) -> jax.Array:
        return spec.init(key_for(key, name), spec.shape, precision.MASTER, out_sharding=layout)

    return map_specs(create, plan, names, layouts)


def to_compute(stored: Any, plan: Any, dtype: Any) -> Any:
    """Casts stored parameters to the compute dtype and gathers them into the compute layout.

    All-gathers each leaf over the mesh axes that split it in storage but not in compute; the
    backward pass reduce-scatters its gradient. What is cast is cast before it travels.
    """
    layouts = rules.partition_specs(plan, rules.COMPUTE)
    return jax.tree.map(_gather, cast(stored, plan, dtype), layouts)


def _gather(leaf: jax.Array, layout: PartitionSpec) -> jax.Array:
    """Lays a parameter out as given, which splits every dimension over as many axes or fewer.

    On TPUs mesh axes are gathered one after the other, the fastest first: XLA makes one gather over
    several of them an all-reduce, which sends twice as much.
    """
    if target_platform() == "tpu":
        split = [rules.entry_axes(entry) for entry in jax.typeof(leaf).sharding.spec]
        for dim, entry in enumerate(layout):
            while len(split[dim]) > len(rules.entry_axes(entry)):
                split[dim] = split[dim][:-1]
                leaf = jax.reshard(leaf, PartitionSpec(*split))
    return jax.reshard(leaf, layout)


def cast(stored: Any, plan: Any, dtype: Any) -> Any:
    """Casts matrices, embedding and head to the compute dtype.

    The router and the norm gains stay float32: ties decide experts, and gains are applied in
    float32. Leaves may be stacks of what the plan describes.
    """

    def convert(spec: ParamSpec, leaf: jax.Array) -> jax.Array:
        rounded = spec.kind in _ROUNDED_KINDS and ROUTER not in spec.tags
        return leaf.astype(dtype) if rounded else leaf

    return map_specs(convert, plan, stored)


def abstract_parameters(plan: Any, mesh: Mesh) -> Any:
    """Returns the stored parameters' shapes, dtypes and shardings, without their values."""

    def describe(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        layout = rules.partition_spec(spec, rules.STORAGE, mesh.shape)
        return jax.ShapeDtypeStruct(
            spec.shape, precision.MASTER, sharding=NamedSharding(mesh, layout)
        )

    return map_specs(describe, plan)
