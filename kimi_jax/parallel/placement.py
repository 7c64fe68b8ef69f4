"""Puts parameters on the mesh, and brings a layer's weights together when it computes."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.core import precision
from kimi_jax.core.param_spec import (
    EMBEDDING,
    HEAD,
    MATRIX,
    ROUTER,
    ParamSpec,
    is_spec,
    map_specs,
)
from kimi_jax.core.rng import key_for
from kimi_jax.core.trees import leaf_names
from kimi_jax.parallel import rules
from kimi_jax.parallel.quantized import gather_quantized
from kimi_jax.quantization.fake_quant import FakeQuantized
from kimi_jax.quantization.formats import QUANTIZED

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

    Args:
      stored: parameters; any may be quantised, or fake-quantised.
      plan: their specs.
      dtype: to compute in.

    Returns:
      The parameters. Quantised routed experts stay quantised, for the kernels that multiply with
      them; others become the values they stand for.
    """
    layouts = rules.partition_specs(plan, rules.COMPUTE)

    def gather(spec: ParamSpec, leaf: Any, layout: PartitionSpec) -> Any:
        if isinstance(leaf, (FakeQuantized, *QUANTIZED)):
            return gather_quantized(spec, leaf, layout, dtype)
        return jax.reshard(leaf.astype(_dtype(spec, dtype)), layout)

    return map_specs(gather, plan, stored, layouts)


def cast(stored: Any, plan: Any, dtype: Any) -> Any:
    """Casts matrices, embedding and head to the compute dtype.

    The router and the norm gains stay float32: ties decide experts, and gains are applied in
    float32. Quantised weights stay what they are. Leaves may be stacks of what the plan describes.
    """

    def convert(spec: ParamSpec, leaf: Any) -> Any:
        return leaf if isinstance(leaf, QUANTIZED) else leaf.astype(_dtype(spec, dtype))

    return map_specs(convert, plan, stored)


def _dtype(spec: ParamSpec, dtype: Any) -> Any:
    rounded = spec.kind in _ROUNDED_KINDS and ROUTER not in spec.tags
    return dtype if rounded else precision.MASTER


def abstract_parameters(plan: Any, mesh: Mesh) -> Any:
    """Returns the stored parameters' shapes, dtypes and shardings, without their values."""

    def describe(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        layout = rules.partition_spec(spec, rules.STORAGE, mesh.shape)
        return jax.ShapeDtypeStruct(
            spec.shape, precision.MASTER, sharding=NamedSharding(mesh, layout)
        )

    return map_specs(describe, plan)
