"""Lets every replica work on its own rows, and brings together what they found once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kimi_jax.parallel.mesh import REPLICA


def num_replicas() -> int:
    """Returns the size of the current mesh's replica axis; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(REPLICA, 1)


def in_replicas(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `fn` in each replica, with the replica axis manual and every other as it is.

    Left to the compiler, whatever is summed over rows is summed over all replicas at once: of a
    layer's gradient every micro-batch, through the slowest network of the mesh.

    Args:
      fn: `(shared, rows) -> results`; combines its results with the functions below, so that all
        replicas return the same.

    Returns:
      A function of arrays that all replicas have, and of those whose second dimension is split over
      the replica axis first.
    """
    return jax.shard_map(
        fn,
        in_specs=(PartitionSpec(), PartitionSpec(None, REPLICA)),
        out_specs=PartitionSpec(),
        axis_names={REPLICA},
        check_vma=False,
    )


def sum_over_replicas(x: jax.Array) -> jax.Array:
    """Adds up what the replicas hold; all-reduces."""
    return jax.lax.psum(x, REPLICA)


def max_over_replicas(x: jax.Array) -> jax.Array:
    """Takes the largest of what the replicas hold; all-reduces."""
    return jax.lax.pmax(x, REPLICA)
