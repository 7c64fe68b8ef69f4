"""What the model trains on at one step."""

import jax
import numpy as np
from flax import struct

from kimi_jax.core.param_spec import Leaf


@struct.dataclass
class Batch:
    """Rows of packed documents.

    Segment 0 is padding. Attention must stay within equal segments.
    """

    inputs: Leaf  # [B, T] int32, token ids
    targets: Leaf  # [B, T] int32, the token after each input
    segments: Leaf  # [B, T] int32, 1, 2, ... for the documents of a row; 0 where it is padded
    positions: Leaf  # [B, T] int32, from 0 at the start of each document and of each row
    weights: Leaf  # [B, T] float32, 1 where the target belongs to the input's document, else 0


def abstract_batch(num_rows: int, num_positions: int, sharding: jax.sharding.Sharding) -> Batch:
    """Returns shapes, dtypes and layout of a batch, without its values."""
    shape = (num_rows, num_positions)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    weights = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
    return Batch(inputs=ids, targets=ids, segments=ids, positions=ids, weights=weights)


FIELDS = ("inputs", "targets", "segments", "positions", "weights")


def pad_batch(batch: Batch, num_rows: int, pad_id: int) -> Batch:
    """Returns host batch `batch` with padding rows added until there are `num_rows`."""

    def pad(array: np.ndarray, value: int) -> np.ndarray:
        missing = num_rows - array.shape[0]
        return np.pad(array, ((0, missing), (0, 0)), constant_values=value)

    return Batch(
        inputs=pad(batch.inputs, pad_id),
        targets=pad(batch.targets, pad_id),
        segments=pad(batch.segments, 0),
        positions=pad(batch.positions, 0),
        weights=pad(batch.weights, 0),
    )
