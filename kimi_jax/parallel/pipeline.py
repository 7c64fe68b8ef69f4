"""Runs a stack of layers in stages, each on its own part of the mesh.

Circular schedule: layer l belongs to stage l mod P. The P micro-batches, one from each stage's own
rows of the batch, follow each other round the ring of stages, L / P times. Every stage is at work
from its first micro-batch to its last; before and after, while the ring fills and empties, it
computes what nobody reads: (P - 1) / (L + P - 1) of all layers that are computed. More
micro-batches would add to what is kept for the backward pass; gradients are accumulated instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kimi_jax.parallel.mesh import PIPE
from kimi_jax.parallel.rules import REPLICATED, entry_axes, without

# (x [b, T, D], stored weights of a layer, inputs of the rows) -> (x, statistics)
Layer = Callable[[Array, Any, Any], tuple[Array, Any]]


def num_stages() -> int:
    """Returns P, the size of the current mesh's pipe axis; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(PIPE, 1)


def deal_layers(stacked: Any) -> Any:
    """Gives every stage its layers, whole along the pipe axis.

    An all-to-all over the pipe axis, to be paid once a step: gradients of the result can be summed
    over micro-batches before `collect_layers` takes them back.

    Args:
      stacked: leaves [L, ...], split along any dimension but the first.

    Returns:
      Leaves [L / P, P, ...], split over the pipe axis along P.
    """
    stages = num_stages()

    def deal(stack: Array) -> Array:
        layout = PartitionSpec(*jax.typeof(stack).sharding.spec[1:])
        rounds = (stack.shape[0] // stages, stages, *stack.shape[1:])
        rounds = jax.lax.reshape(stack, rounds, out_sharding=PartitionSpec(None, None, *layout))
        return jax.reshard(rounds, PartitionSpec(None, PIPE, *without(layout, {PIPE})))

    return jax.tree.map(deal, stacked)


def collect_layers(dealt: Any, layouts: Any) -> Any:
    """Undoes `deal_layers`: leaves [L / P, P, ...] become [L, ...], laid out as given."""

    def collect(rounds: Array, layout: PartitionSpec) -> Array:
        stack = jax.reshard(rounds, PartitionSpec(None, None, *layout[1:]))
        shape = (rounds.shape[0] * rounds.shape[1], *rounds.shape[2:])
        return jax.lax.reshape(stack, shape, out_sharding=layout)

    return jax.tree.map(collect, dealt, layouts)


def pipeline(
    layer: Layer,
    dealt: Any,
    x: Float[Array, "B T D"],
    row_inputs: Any,
    *,
    remat: Callable[[Callable], Callable],
) -> tuple[Float[Array, "B T D"], Any]:
    """Applies layers 0, 1 ... L - 1 to x, layer l on stage l mod P.

    Rows travel from stage to stage after each layer, and to the first stage before and from the
    last one after all.

    Args:
      layer: one layer; runs with the pipe axis manual, every other as it is.
      dealt: weights, as `deal_layers` returns them.
      x: activations, rows split over the pipe axis and others.
      row_inputs: what else a layer needs to know of the rows, leaves [B, ...] laid out like x.
      remat: wraps a function so that its backward pass computes it again.

    Returns:
      The activations after the last layer, laid out like x, and the statistics, stacked along a
      leading axis L and a second one of P micro-batches.
    """
    rows, layers = PartitionSpec(PIPE), PartitionSpec(None, PIPE)
    run = jax.shard_map(
        functools.partial(_run_stage, layer=layer, remat=remat),
        in_specs=(layers, rows, rows),
        out_specs=(rows, layers),
        axis_names={PIPE},
        check_vma=False,
    )
    layout = jax.typeof(x).sharding.spec
    x, stats = run(dealt, *jax.tree.map(_split_by_stage_first, (x, row_inputs)))
    return jax.reshard(x, layout), jax.tree.map(_join_stages, stats)


def _split_by_stage_first(rows: Array) -> Array:
    """Makes the pipe axis the slowest of those that split the rows, as manual axes have to be."""
    first, *others = jax.typeof(rows).sharding.spec
    faster = (name for name in entry_axes(first) if name != PIPE)
    return jax.reshard(rows, PartitionSpec((PIPE, *faster), *others))


def _join_stages(stats: Array) -> Array:
    """Returns [L / P, P, ...] as [L, ...], whole along the pipe axis."""
    layout = without(jax.typeof(stats).sharding.spec, {PIPE})
    # By way of whole copies; XLA warns that it finds no shorter one.
    return jax.reshard(jax.reshard(stats, REPLICATED), layout).reshape(-1, *stats.shape[2:])


def _run_stage(
    own: Any, x: Float[Array, "b T D"], row_inputs: Any, *, layer: Layer, remat: Callable
) -> tuple[Float[Array, "b T D"], Any]:
    """Computes one stage's layers for each micro-batch, with weights [L / P, 1, ...]."""
    stage, stages = jax.lax.axis_index(PIPE), jax.lax.axis_size(PIPE)
    visits = jax.tree.leaves(own)[0].shape[0] * stages  # of micro-batches to this stage
    waiting = jax.tree.map(_bring_to_first_stage, (x, row_inputs))
    ring = [(sender, (sender + 1) % stages) for sender in range(stages)]

    @remat  # so that not every visit's copy of the weights is kept
    def visit(x: Array, row_inputs: Any, number: Array) -> tuple[Array, Any]:
        weights = jax.tree.map(lambda leaf: _item(leaf, number // stages)[0], own)
        return layer(x, weights, row_inputs)

    def tick(carry: tuple[Any, Array], time: Array) -> tuple[tuple[Any, Array], Any]:
        arrived, finished = carry
        starts = (stage == 0) & (time < stages)
        x, row_inputs = jax.tree.map(
            lambda first, came: jnp.where(starts, _item(first, time % stages), came),
            waiting,
            arrived,
        )
        x, stats = visit(x, row_inputs, jnp.clip(time - stage, 0, visits - 1))
        # The last stage's last P results stay; those before them are overwritten.
        finished = jax.lax.dynamic_update_index_in_dim(finished, x, (time + 1) % stages, 0)
        sent = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, PIPE, ring), (x, row_inputs))
        return (sent, finished), stats

    ticks = jnp.arange(visits + stages - 1)
    (_, finished), stats = jax.lax.scan(tick, ((x, row_inputs), waiting[0]), ticks)
    stats = jax.tree.map(lambda leaf: _of_visits(leaf, stage, visits, stages), stats)
    return _bring_from_last_stage(finished), stats


def _bring_to_first_stage(x: Array) -> Array:
    """Returns every stage's x, [P, ...], on the first stage, and zeros elsewhere.

    One transfer from each stage: XLA makes an all-to-all over one mesh axis gather what the other
    axes split.
    """
    stages = jax.lax.axis_size(PIPE)
    return jnp.stack([jax.lax.ppermute(x, PIPE, [(stage, 0)]) for stage in range(stages)])


def _bring_from_last_stage(parts: Array) -> Array:
    """Returns part s of the last stage's [P, ...] on stage s."""
    last = jax.lax.axis_size(PIPE) - 1
    return sum(jax.lax.ppermute(part, PIPE, [(last, s)]) for s, part in enumerate(parts))


def _item(stack: Array, number: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _of_visits(stats: Array, stage: Array, visits: int, stages: int) -> Array:
    """Leaves out the ticks without work: [ticks, ...] becomes [L / P, 1, P, ...]."""
    worked = jax.lax.dynamic_slice_in_dim(stats, stage, visits)
    return worked.reshape(visits // stages, stages, *stats.shape[1:])[:, None]
