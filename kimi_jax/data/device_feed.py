"""Puts batches on the mesh one step before they are needed.

In a run of several processes each makes only the rows that its own devices hold.
"""

from typing import Any

import jax
import numpy as np

from kimi_jax.configs.data import DataConfig
from kimi_jax.data.batches import Batch
from kimi_jax.data.corpus import Corpus
from kimi_jax.data.pipeline import BatchIterator, train_batches


def local_rows(sharding: jax.sharding.NamedSharding, shape: tuple[int, int]) -> list[int]:
    """Returns which rows of a [B, T] array this process's devices hold, in ascending order."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for rows, *_ in indices for row in range(*rows.indices(shape[0]))})


def put_batch(
    batch: Batch, sharding: jax.sharding.NamedSharding, num_rows: int | None = None
) -> Batch:
    """Returns host batch `batch` as global arrays with layout `sharding`.

    Args:
      batch: its `local_rows`, or the whole batch, the same in every process.
      sharding: layout of each [B, T] array.
      num_rows: B; None where `batch` is whole.
    """

    def put(array: np.ndarray) -> jax.Array:
        shape = (num_rows or array.shape[0], *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(put, batch)


class DeviceFeed:
    """Batches on devices; while step k computes, batch k + 1 is already on its way.

    Args:
      batches: host batches, of this process's `local_rows`.
      sharding: layout of each [B, T] array.
      num_rows: B.
    """

    def __init__(self, batches: BatchIterator, sharding: jax.sharding.NamedSharding, num_rows: int):
        self._batches = batches
        self._sharding = sharding
        self._num_rows = num_rows
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
        return put_batch(next(self._batches), self._sharding, self._num_rows)


def open_feed(
    corpus: Corpus, config: DataConfig, num_rows: int, sharding: jax.sharding.NamedSharding
) -> DeviceFeed:
    """Returns the training batches of `num_rows` rows on the mesh, from step 0."""
    part = local_rows(sharding, (num_rows, config.sequence_length))
    return DeviceFeed(train_batches(corpus, config, num_rows, part), sharding, num_rows)
