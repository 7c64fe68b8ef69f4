"""Quantisation-aware training: which weights are rounded, and how they travel with the others."""

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import struct

from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import MATRIX, ParamSpec, is_spec, map_specs, named_specs
from kimi_jax.core.trees import leaf_names
from kimi_jax.quantization.fake_quant import FakeQuantized
from kimi_jax.quantization.formats import QUANTIZED


@struct.dataclass
class QuantizedOnUse:
    """Stands where a `FakeQuantized` weight's rounded values will, once its layer runs."""

    format: WeightFormat = struct.field(pytree_node=False)
    group_size: int = struct.field(pytree_node=False)


def choose(plan: Any, config: QuantizationConfig) -> Any:
    """Returns for each parameter of a plan whether it is quantised.

    Raises:
      ConfigError: none is, or one cannot be, with its name and the reason.
    """
    names = leaf_names(plan, is_leaf=is_spec)
    chosen = map_specs(lambda spec, name: _is_chosen(spec, name, config), plan, names)
    if config.enabled:
        wanted = config.tag or config.pattern
        require(
            any(jax.tree.leaves(chosen)),
            f"quantization: no weight of this model is chosen by {wanted!r}; its weights are named "
            f"like {', '.join(jax.tree.leaves(names)[:3])}",
        )
    return chosen


def _is_chosen(spec: ParamSpec, name: str, config: QuantizationConfig) -> bool:
    if not config.enabled:
        return False
    if config.pattern is None:
        chosen = config.tag in spec.tags
    else:
        chosen = re.fullmatch(config.pattern, name) is not None
    if chosen:
        _check(spec, name, config)
    return chosen


def _check(spec: ParamSpec, name: str, config: QuantizationConfig) -> None:
    require(spec.kind == MATRIX, f"quantization: {name} is no matrix, but {spec.kind}")
    require(
        spec.axes[-2] in spec.inputs and spec.axes[-1] not in spec.inputs,
        f"quantization: groups lie along the last axis but one, and the inputs of {name} "
        f"{spec.axes} are {spec.inputs}; leave it out by quantization.pattern",
    )
    require(
        spec.shape[-2] % config.group_size == 0,
        f"quantization.group_size ({config.group_size}) must divide the {spec.shape[-2]} inputs "
        f"of {name}",
    )


def describe(plan: Any, config: QuantizationConfig) -> str:
    """Says in a line what a run rounds."""
    chosen = jax.tree.leaves(choose(plan, config))
    sizes = [spec.size for _, spec in named_specs(plan)]
    values = sum(size for size, flag in zip(sizes, chosen, strict=True) if flag)
    return (
        f"{values:,} of {sum(sizes):,} parameters in {config.format.value}, groups of "
        f"{config.group_size}, from step {config.start_step}"
    )


def attach(params: Any, quantized: Any) -> Any:
    """Puts a `FakeQuantized` weight where `quantized` has one; other parameters stay what they are.

    Args:
      params: parameters; they keep their gradients.
      quantized: a tree like theirs of quantised weights, None for those that are not; None for all.
    """
    return _put(quantized, params, FakeQuantized)


def substitute(params: Any, quantized: Any) -> Any:
    """Puts quantised weights in the place of parameters: for a model that is trained no more."""
    return _put(quantized, params, lambda weight, values: values)


def _put(quantized: Any, params: Any, join: Callable[[Any, Any], Any]) -> Any:
    if quantized is None:
        return params
    nodes = (*QUANTIZED, QuantizedOnUse)
    return jax.tree.map(
        lambda values, weight: weight if values is None else join(weight, values),
        quantized,
        params,
        is_leaf=lambda node: node is None or isinstance(node, nodes),
    )
