"""Gradients of a batch computed in micro-batches, equal to those of the batch at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kimi_jax.core import precision
from kimi_jax.model import stats as model_stats
from kimi_jax.model.stats import ModelStats
from kimi_jax.parallel import rules
from kimi_jax.parallel.replicas import (
    in_replicas,
    max_over_replicas,
    num_replicas,
    sum_over_replicas,
)

Parts = dict[str, jax.Array]
# Takes parameters, a micro-batch, and constants; returns the micro-batch's share of the batch's
# loss, and with it (named parts of the share, statistics).
LossFunction = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Parts, ModelStats]]]


def split_micro_batches(batch: Any, count: int) -> Any:
    """Splits leaves [B, T] into [count, B / count, T] without communication.

    Micro-batch i takes row i, i + count, i + 2 count ... so that each device's rows stay its own.
    """

    def split(leaf: jax.Array) -> jax.Array:
        rows = leaf.shape[0] // count
        layout = PartitionSpec(rules.TOKENS[0], None, *rules.TOKENS[1:])
        grouped = jax.lax.reshape(leaf, (rows, count, *leaf.shape[1:]), out_sharding=layout)
        return jnp.moveaxis(grouped, 1, 0)

    return jax.tree.map(split, batch)


def accumulate(
    loss_fn: LossFunction, params: Any, micro_batches: Any, constants: Any
) -> tuple[Any, Parts, ModelStats]:
    """Sums losses and gradients over micro-batches and merges their statistics.

    Exact token weighting is the loss function's part: it divides by the weight of the whole batch,
    one of the constants, so that shares add up whatever the micro-batches hold. Replicas compute
    apart, and add up what they have after the last micro-batch.

    Args:
      loss_fn: see `LossFunction`; its shares and parts are added, its statistics merged each by
        its declared reduction (maxima stay maxima).
      params: differentiated.
      micro_batches: leaves with a leading axis of micro-batches.
      constants: what the loss depends on beside, the same for all micro-batches.

    Returns:
      Gradients in float32, the parts of the loss, the statistics.
    """
    shared = (params, constants)
    if num_replicas() == 1:
        return _accumulate(loss_fn, shared, micro_batches)
    run = in_replicas(functools.partial(_accumulate_and_agree, loss_fn))
    return run(shared, micro_batches)


def _accumulate_and_agree(
    loss_fn: LossFunction, shared: tuple[Any, Any], micro_batches: Any
) -> tuple[Any, Parts, ModelStats]:
    """Accumulates a replica's own rows, and brings all replicas' results together once."""
    gradients, parts, stats = _accumulate(loss_fn, shared, micro_batches)
    summed = jax.tree.map(sum_over_replicas, (gradients, parts))
    combine = {"sum": sum_over_replicas, "max": max_over_replicas}
    return *summed, model_stats.reduce_with(combine, stats)


def _accumulate(
    loss_fn: LossFunction, shared: tuple[Any, Any], micro_batches: Any
) -> tuple[Any, Parts, ModelStats]:
    """Accumulates over micro-batches; `shared` are the parameters and the constants."""
    params, constants = shared
    gradient_fn = jax.grad(loss_fn, has_aux=True)

    def compute(micro_batch: Any) -> tuple[Any, Parts, ModelStats]:
        gradients, (parts, stats) = gradient_fn(params, micro_batch, constants)
        return precision.cast_floats(gradients, precision.MASTER), parts, stats

    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if jax.tree.leaves(micro_batches)[0].shape[0] == 1:
        return compute(first)

    def add(total: Any, micro_batch: Any) -> tuple[Any, None]:
        gradients, parts, stats = compute(micro_batch)
        summed = jax.tree.map(jnp.add, total[:2], (gradients, parts))
        return (*summed, model_stats.merge(total[2], stats)), None

    # From nothing, not from the first micro-batch, so that the model is compiled once.
    gradients, parts, stats = jax.eval_shape(compute, first)
    nothing = (*jax.tree.map(_zeros, (gradients, parts)), model_stats.neutral(stats))
    total, _ = jax.lax.scan(add, nothing, micro_batches)
    return total


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.lax.full(like.shape, 0, like.dtype, sharding=like.sharding)
