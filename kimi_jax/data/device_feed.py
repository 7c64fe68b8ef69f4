"""Puts batches on the mesh one step before they are needed."""

from typing import Any

import jax

from kimi_jax.data.batches import Batch
from kimi_jax.data.pipeline import BatchIterator


def put_batch(batch: Batch, sharding: jax.sharding.NamedSharding) -> Batch:
    """Returns host batch `batch` as global arrays with layout `sharding`.

    Every process passes the same whole batch; each copies the parts of its own devices.
    """
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, array.shape), batch
    )


class DeviceFeed:
    """Batches on devices; while step k computes, batch k + 1 is already on its way.

    Args:
      batches: host batches.
      sharding: layout of each [B, T] array.
    """

    def __init__(self, batches: BatchIterator, sharding: jax.sharding.NamedSharding):
        self._batches = batches
        self._sharding = sharding
        self._ahead: Batch | None = None
        self._state = batches.get_state()

    def __iter__(self) -> "DeviceFeed":
        return self

    def __next__(self) -> Batch:
        batch = self._ahead if self._ahead is not None else self._put_next()
        self._state = self._batches.get_state()
        self._ahead = self._put_next()
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, not the one prepared ahead."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the batch that was next when `get_state` returned `state`."""
        self._batches.set_state(state)
        self._state = state
        self._ahead = None

    def close(self) -> None:
        """Stops what prepares host batches ahead."""
        self._batches.close()
        self._ahead = None

    def _put_next(self) -> Batch:
        return put_batch(next(self._batches), self._sharding)
