"""Moves whole matrices to devices, so that work on a stack of them is done once in the mesh."""

import dataclasses
import functools
import graphlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kimi_jax.parallel.mesh import CONTEXT, TENSOR
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.parallel.rules import entry_axes

# On CPU, jax 0.12 multiplies batches of a few matrices with all cores, single ones with one core;
# larger batches fall out of the caches. Older versions compile batched products badly.
_CPU_BATCH = 4 if jax.__version_info__ >= (0, 12) else 1

# Values of whole matrices (128 MB in bfloat16) that a device exchanges and computes at a time:
# enough to fill an accelerator, and a bound on the temporary memory, which is several times that.
CHUNK_VALUES = 2**26


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the local part of a stack is shared out.

    Attributes:
      stack_dims: leading dimensions that are the stack.
      count: items of the local stack, before any exchange.
      padded: the same, padded to a multiple of the devices that share them.
      chunk: items that are exchanged and computed together; divides `padded`.
      first: padding in front of the items; the rest follows behind.
      hops: mesh axes that share the stack, in the order of exchange.
      split_dims: for each array, the dimension that each of its mesh axes splits.
    """

    stack_dims: int
    count: int
    padded: int
    chunk: int
    first: int
    hops: tuple[str, ...]
    split_dims: tuple[dict[str, int], ...]


def map_matrices(fn: Callable[[Any], Any], tree: Any, *, stack_dims: int, rotation: int = 0) -> Any:
    """Applies `fn` to each item of a stack, every item whole and computed once in the whole mesh.

    Under an Explicit mesh, all-to-alls over one mesh axis after the other turn a stack of split
    items into a split stack of whole items; each device computes its own, and the same hops lead
    back. Large stacks go through this in chunks of `CHUNK_VALUES` a device. Mesh axes that split
    the stack itself need no communication. Along mesh axes where the stack is replicated, each
    device computes its share and the results are all-gathered. Without a mesh, everything is
    computed where it is.

    Args:
      fn: from one item, a tree of arrays without the stack dimensions, to a tree of the same
        structure, shapes and dtypes.
      tree: arrays with the same leading stack dimensions, laid out the same along them.
      stack_dims: how many leading dimensions are the stack.
      rotation: stacks smaller than the mesh occupy different devices for different numbers.

    Returns:
      The results, stacked and laid out as `tree`.
    """
    leaves, structure = jax.tree.flatten(tree)

    def apply(items: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(fn(jax.tree.unflatten(structure, items)))

    axis_sizes = dict(jax.typeof(leaves[0]).sharding.mesh.shape)
    if not axis_sizes:
        stacks = [leaf.reshape(-1, *leaf.shape[stack_dims:]) for leaf in leaves]
        count = stacks[0].shape[0]
        mapped = _compute(apply, stacks, 0, count)
        mapped = [out.reshape(leaf.shape) for out, leaf in zip(mapped, leaves, strict=True)]
        return jax.tree.unflatten(structure, mapped)
    specs = [_full_spec(leaf) for leaf in leaves]
    body = functools.partial(
        _map_matrices_per_shard,
        fn=apply,
        plan=_make_plan(leaves, specs, stack_dims, rotation, axis_sizes),
    )
    mapped = per_shard(body, in_specs=(specs,), out_specs=specs)(leaves)
    return jax.tree.unflatten(structure, mapped)


def _map_matrices_per_shard(
    leaves: list[jax.Array], *, fn: Callable[..., Any], plan: _Plan
) -> list[jax.Array]:
    """Maps a chunk of the local stack after the other, each in the place where it lay."""
    padding = (plan.first, plan.padded - plan.count - plan.first)
    stacks = []
    for leaf in leaves:
        stack = leaf.reshape(-1, *leaf.shape[plan.stack_dims :])
        stacks.append(jnp.pad(stack, (padding, *((0, 0),) * (stack.ndim - 1))))

    def step(number: Any, stacks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = number * plan.chunk
        chunk = [jax.lax.dynamic_slice_in_dim(stack, start, plan.chunk) for stack in stacks]
        mapped = _map_chunk_per_shard(chunk, start, fn=fn, plan=plan)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(stack, done, start, 0)
            for stack, done in zip(stacks, mapped, strict=True)
        )

    stacks = jax.lax.fori_loop(0, plan.padded // plan.chunk, step, tuple(stacks))
    return [
        jax.lax.slice_in_dim(stack, plan.first, plan.first + plan.count).reshape(leaf.shape)
        for stack, leaf in zip(stacks, leaves, strict=True)
    ]


def _map_chunk_per_shard(
    stacks: list[jax.Array], start: Any, *, fn: Callable[..., Any], plan: _Plan
) -> list[jax.Array]:
    """All-to-alls [c, n/d, m] -> [c/d, n, m] for each hop, applies `fn`, and goes back."""
    shared = []
    for stack, split_dims in zip(stacks, plan.split_dims, strict=True):
        for name in plan.hops:
            stack = _take_share(stack, name, split_dims.get(name))
        shared.append(stack)

    # Devices own consecutive parts of the chunk, the first hop's axis being the slowest.
    owned = plan.chunk
    for name in plan.hops:
        owned //= jax.lax.axis_size(name)
        start += jax.lax.axis_index(name) * owned
    begin, end = 0, owned
    if plan.padded > plan.count:  # else the number of batches is known when compiling
        begin = jnp.clip(plan.first - start, 0, owned)
        end = jnp.clip(plan.first + plan.count - start, 0, owned)
    mapped = _compute(fn, shared, begin, end)

    results = []
    for stack, split_dims in zip(mapped, plan.split_dims, strict=True):
        for name in reversed(plan.hops):
            stack = _return_share(stack, name, split_dims.get(name))
        results.append(stack)
    return results


def _take_share(stack: jax.Array, name: str, dim: int | None) -> jax.Array:
    """Splits the stack over a mesh axis; `dim`, where the axis splits one, becomes whole."""
    if dim is not None:
        return jax.lax.all_to_all(stack, name, split_axis=0, concat_axis=dim, tiled=True)
    size = stack.shape[0] // jax.lax.axis_size(name)
    return jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(name) * size, size)


def _return_share(stack: jax.Array, name: str, dim: int | None) -> jax.Array:
    """Undoes `_take_share`."""
    if dim is not None:
        return jax.lax.all_to_all(stack, name, split_axis=dim, concat_axis=0, tiled=True)
    return jax.lax.all_gather(stack, name, tiled=True)


def _compute(
    fn: Callable[..., Any], stacks: list[jax.Array], begin: Any, end: Any
) -> list[jax.Array]:
    """Applies `fn` to the items begin .. end, in batches; batches of padding alone are left out.

    Results take the place of the items, so that there is one copy of the stacks.
    """
    owned = stacks[0].shape[0]
    values = sum(math.prod(stack.shape[1:]) for stack in stacks)

    def in_batches_of(batch: int, begin: Any, end: Any, *stacks: jax.Array):
        def step(number, stacks):
            items = [jax.lax.dynamic_slice_in_dim(s, number * batch, batch) for s in stacks]
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(stack, done, number * batch, 0)
                for stack, done in zip(stacks, jax.vmap(fn)(items), strict=True)
            )

        return jax.lax.fori_loop(begin // batch, -(-end // batch), step, tuple(stacks))

    cpu = _largest_divisor(owned, _CPU_BATCH)
    accelerator = _largest_divisor(owned, max(1, CHUNK_VALUES // values))
    results = jax.lax.platform_dependent(
        begin,
        end,
        *stacks,
        cpu=functools.partial(in_batches_of, cpu),
        default=functools.partial(in_batches_of, accelerator),
    )
    return list(results)


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def _full_spec(leaf: jax.Array) -> PartitionSpec:
    spec = jax.typeof(leaf).sharding.spec
    return PartitionSpec(*spec, *(None,) * (leaf.ndim - len(spec)))


def _make_plan(
    leaves: list[jax.Array],
    specs: list[PartitionSpec],
    stack_dims: int,
    rotation: int,
    axis_sizes: dict[str, int],
) -> _Plan:
    stacked = {tuple(map(entry_axes, spec[:stack_dims])) for spec in specs}
    assert len(stacked) == 1, f"arrays are stacked in different layouts: {specs}"
    stack_axes = {name for entry in stacked.pop() for name in entry}
    entries = [entry_axes(entry) for spec in specs for entry in spec]
    names = _slowest_first(tuple(axis_sizes), entries)
    hops = tuple(n for n in reversed(names) if n not in stack_axes and axis_sizes[n] > 1)
    sharers = math.prod(axis_sizes[name] for name in hops)
    stack_shards = math.prod(axis_sizes[name] for name in stack_axes)
    count = math.prod(leaves[0].shape[:stack_dims]) // stack_shards
    padded = -(-count // sharers) * sharers
    item_values = sum(math.prod(leaf.shape[stack_dims:]) for leaf in leaves)
    return _Plan(
        stack_dims=stack_dims,
        count=count,
        padded=padded,
        chunk=sharers * _largest_divisor(padded // sharers, max(1, CHUNK_VALUES // item_values)),
        first=rotation % (padded - count + 1),
        hops=hops,
        split_dims=tuple(
            {
                name: dim
                for dim, entry in enumerate(spec[stack_dims:], start=1)
                for name in entry_axes(entry)
            }
            for spec in specs
        ),
    )


def _slowest_first(names: tuple[str, ...], entries: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Orders mesh axes so that each entry of a PartitionSpec names them in this order.

    Where several axes split one dimension, the fastest has to be exchanged first, so that the
    pieces join in order.
    """
    sorter = graphlib.TopologicalSorter({name: () for name in names})
    for entry in entries:
        for slow, fast in itertools.pairwise(entry):
            sorter.add(fast, slow)
    return tuple(sorter.static_order())


def sum_over_tensor_per_shard(x: Array) -> Array:
    """Adds up what the devices along the tensor axis hold; all-reduces."""
    return x if jax.lax.axis_size(TENSOR) == 1 else jax.lax.psum(x, TENSOR)


def logsumexp_over_tensor_per_shard(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns log sum exp(x) over the devices along the tensor axis; all-reduces twice."""
    if jax.lax.axis_size(TENSOR) == 1:
        return x
    largest = jax.lax.pmax(jax.lax.stop_gradient(x), TENSOR)
    return largest + jnp.log(jax.lax.psum(jnp.exp(x - largest), TENSOR))


def first_of_tensor_share_per_shard(size: int) -> Any:
    """Number of this device's first item where each along the tensor axis has `size` in order."""
    return jax.lax.axis_index(TENSOR) * size


def mean_of_positions_per_shard(x: Float[Array, "b T *rest"]) -> Float[Array, "b *rest"]:
    """Averages over all positions of a sequence; all-reduces over the context axis."""
    mean = jnp.mean(x, axis=1)
    return mean if jax.lax.axis_size(CONTEXT) == 1 else jax.lax.pmean(mean, CONTEXT)
