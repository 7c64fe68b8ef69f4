"""What the forward pass measures, and how each measurement is reduced.

Statistics are return values. Every field declares its reduction over devices, micro-batches and
steps; layers are never mixed: a head's maximum belongs to its layer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kimi_jax.core.param_spec import Leaf

_COMBINE = {"max": jnp.maximum, "sum": jnp.add}
_NEUTRAL = {"max": -jnp.inf, "sum": 0.0}


def _reduced_by(reduction: str) -> Any:
    return struct.field(metadata={"reduction": reduction})


@struct.dataclass
class BlockStats:
    """One block's measurements of one forward pass, before any reduction.

    The expert fields are None in a dense block.
    """

    max_logit: Leaf  # [B, N] largest attention logit of each sequence and head
    expert_load: Leaf  # [shards, E] tokens each shard of them sent to each expert
    dropped: Leaf  # [shards] assignments that found no room in the expert exchange
    balance_loss: Leaf  # [B] sequence-wise balance loss


@struct.dataclass
class ModelStats:
    """All blocks' measurements, reduced over sequences and devices."""

    max_logit: Leaf = _reduced_by("max")  # [L, N] float32
    expert_load: Leaf = _reduced_by("sum")  # [L_moe, E] float32: assignments; None without experts
    dropped: Leaf = _reduced_by("sum")  # scalar: assignments, over layers; None likewise
    balance_loss: Leaf = _reduced_by("sum")  # scalar, over sequences and layers; None likewise


def reduce_blocks(stacks: list[BlockStats]) -> ModelStats:
    """Reduces stacked block statistics over sequences and devices.

    Args:
      stacks: leaves with a leading axis L, and behind a pipeline an axis of micro-batches.
    """
    loads = [s.expert_load for s in stacks if s.expert_load is not None]
    dropped = [s.dropped for s in stacks if s.dropped is not None]
    losses = [s.balance_loss for s in stacks if s.balance_loss is not None]
    return ModelStats(
        max_logit=jnp.concatenate([_between(jnp.max, s.max_logit) for s in stacks]),
        expert_load=_between(jnp.sum, loads[0]) if loads else None,
        dropped=jnp.sum(dropped[0]) if dropped else None,
        balance_loss=jnp.sum(losses[0]) if losses else None,
    )


def _between(reduce: Any, stack: jax.Array) -> jax.Array:
    """Reduces all axes but the first and the last."""
    return reduce(stack, axis=tuple(range(1, stack.ndim - 1)))


def merge(first: ModelStats, second: ModelStats) -> ModelStats:
    """Combines the statistics of two micro-batches, each field by its declared reduction."""
    merged = {}
    for field in dataclasses.fields(ModelStats):
        combine = _COMBINE[field.metadata["reduction"]]
        pair = getattr(first, field.name), getattr(second, field.name)
        merged[field.name] = jax.tree.map(combine, *pair)
    return ModelStats(**merged)


def neutral(like: ModelStats) -> ModelStats:
    """Returns what `merge` changes nothing with.

    Args:
      like: shapes, dtypes and layouts.
    """

    def fill(field: dataclasses.Field) -> Any:
        value = _NEUTRAL[field.metadata["reduction"]]
        return jax.tree.map(
            lambda leaf: jax.lax.full(leaf.shape, value, leaf.dtype, sharding=leaf.sharding),
            getattr(like, field.name),
        )

    return ModelStats(**{field.name: fill(field) for field in dataclasses.fields(ModelStats)})
