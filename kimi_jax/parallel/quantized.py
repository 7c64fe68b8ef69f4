"""Rounds weights where they are stored, and brings codes, not weights, to where they are used."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kimi_jax.configs.quantization import QuantizationConfig, Quantize
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import ROUTED_EXPERT, ParamSpec, map_specs
from kimi_jax.parallel import rules
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.quantization import qat
from kimi_jax.quantization.fake_quant import FakeQuantized, Weight, straight_through
from kimi_jax.quantization.formats import QUANTIZED, QUANTIZERS, dequantize


def quantize(stored: Any, plan: Any, dtype: Any, config: QuantizationConfig) -> Any:
    """Rounds the chosen parameters to few bits, each device its own share.

    Communicates only where a share does not hold whole groups.

    Args:
      stored: parameters.
      plan: their specs.
      dtype: in which they would enter products.
      config: which ones, and when.

    Returns:
      A tree for `quantization.qat.attach`; None where nothing is quantised.

    Raises:
      ConfigError: none is chosen, or one cannot be quantised.
    """
    if not config.enabled:
        return None
    marker = qat.QuantizedOnUse(config.format, config.group_size)

    def convert(spec: ParamSpec, leaf: jax.Array, chosen: bool) -> Any:
        if not chosen:
            return None
        if config.quantize is Quantize.USE:
            return marker
        layout = storage_layout(spec, config.group_size, _axis_sizes())
        weight = rules.reshard(leaf.astype(dtype), layout)
        return _quantize(spec, weight, layout, marker)

    return map_specs(convert, plan, stored, qat.choose(plan, config))


def storage_layout(
    spec: ParamSpec, group_size: int, axis_sizes: Mapping[str, int]
) -> PartitionSpec:
    """Lays out codes and scales of a quantised parameter: each device has whole groups."""
    return rules.partition_spec(_of_groups(spec, group_size), rules.STORAGE, axis_sizes)


def gather_quantized(spec: ParamSpec, leaf: Any, layout: PartitionSpec, dtype: Any) -> Weight:
    """Gathers codes, not weights, where there are codes already.

    Args:
      spec: of the weight.
      leaf: the stored weight, quantised or fake-quantised.
      layout: to gather it into.
      dtype: to compute in.

    Returns:
      Routed experts still quantised, for the kernels that multiply with them; of other weights the
      values they stand for, with the carrier's gradient.
    """
    weight = _gather(spec, leaf, layout, dtype)
    return weight if ROUTED_EXPERT in spec.tags else _dense(weight, layout, dtype)


def _gather(spec: ParamSpec, leaf: Any, layout: PartitionSpec, dtype: Any) -> Any:
    if isinstance(leaf, QUANTIZED):
        return _gather_codes(spec, leaf, layout)
    if isinstance(leaf.quantized, qat.QuantizedOnUse):
        weight = jax.reshard(leaf.carrier.astype(dtype), layout)
        rounded = _quantize(spec, jax.lax.stop_gradient(weight), layout, leaf.quantized)
        return FakeQuantized(carrier=weight, quantized=rounded)
    return FakeQuantized(
        carrier=_stand_in(layout, jax.typeof(leaf.carrier).sharding.spec, dtype, leaf.carrier),
        quantized=_gather_codes(spec, leaf.quantized, layout),
    )


def _gather_codes(spec: ParamSpec, weight: Any, layout: PartitionSpec) -> Any:
    _check_groups(spec, layout, weight.group_size)
    return jax.tree.map(lambda part: jax.reshard(part, layout), weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stand_in(layout: PartitionSpec, stored: PartitionSpec, dtype: Any, master: jax.Array):
    """Returns zeros with a weight's shape, laid out as gathered, and with its gradient."""
    del stored
    return jnp.zeros(master.shape, dtype, out_sharding=layout)


def _stand_in_forward(layout: PartitionSpec, stored: PartitionSpec, dtype: Any, master: jax.Array):
    return _stand_in(layout, stored, dtype, master), jnp.zeros((), master.dtype)


def _stand_in_backward(layout, stored, dtype, like, gradient):
    del layout, dtype
    return (jax.reshard(gradient, stored).astype(like.dtype),)


_stand_in.defvjp(_stand_in_forward, _stand_in_backward)


def _dense(weight: Any, layout: PartitionSpec, dtype: Any) -> jax.Array:
    """Returns the values of a gathered weight; a carrier keeps its gradient."""
    rounded = weight.quantized if isinstance(weight, FakeQuantized) else weight
    values_of = functools.partial(dequantize, dtype=dtype)
    values = per_shard(values_of, in_specs=(layout,), out_specs=layout)(rounded)
    if isinstance(weight, FakeQuantized):
        return straight_through(weight.carrier, values)
    return values


def _quantize(
    spec: ParamSpec, weight: jax.Array, layout: PartitionSpec, how: qat.QuantizedOnUse
) -> Any:
    _check_groups(spec, layout, how.group_size)
    quantize_share = functools.partial(QUANTIZERS[how.format].quantize, group_size=how.group_size)
    return per_shard(quantize_share, in_specs=(layout,), out_specs=layout)(weight)


def _of_groups(spec: ParamSpec, group_size: int) -> ParamSpec:
    """The spec of a matrix's scales: what cannot be split inside a group is not."""
    *others, inputs, outputs = spec.shape
    return dataclasses.replace(spec, shape=(*others, inputs // group_size, outputs))


def _check_groups(spec: ParamSpec, layout: PartitionSpec, group_size: int) -> None:
    """Raises `ConfigError` where the mesh would split groups."""
    groups = _of_groups(spec, group_size).shape[-2]
    entry = layout[len(spec.shape) - 2] if len(layout) > len(spec.shape) - 2 else None
    axes = rules.entry_axes(entry)
    shards = math.prod(_axis_sizes()[name] for name in axes)
    require(
        groups % shards == 0,
        f"the {spec.shape[-2]} inputs of a quantised weight, {groups} groups of {group_size}, "
        f"cannot be split into {shards} parts over {' x '.join(axes)}; choose a smaller one in "
        f"parallel, or another quantization.group_size",
    )


def _axis_sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)
