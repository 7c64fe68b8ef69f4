"""Packs documents into rows of fixed length, any row at random, without state.

The documents of an epoch, in some order, form one stream of tokens. Row r has the inputs r*T ..
r*T + T - 1 of the stream and the targets one further, so that every token of the stream but the
first is a target exactly once; the last row is padded.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, Integer

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclasses.dataclass(frozen=True)
class DocumentStream:
    """Documents end to end in a given order.

    Attributes:
      tokens: ids of all documents as they are stored, [W].
      begins: int64 [documents], where in `tokens` the k-th document of the stream begins.
      bounds: int64 [documents + 1], where in the stream it begins; the last is the stream's length.
    """

    tokens: np.ndarray
    begins: np.ndarray
    bounds: np.ndarray


def arrange(
    tokens: Integer[np.ndarray, "W"],
    offsets: Int[np.ndarray, "boundaries"],
    order: Int[np.ndarray, "documents"],
) -> DocumentStream:
    """Returns the stream of stored documents in the order `order`.

    Args:
      tokens: ids of all documents.
      offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`; one more than there are documents.
      order: which document comes first, second, ...
    """
    lengths = np.diff(offsets)[order]
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return DocumentStream(tokens=tokens, begins=offsets[:-1][order], bounds=bounds)


def count_rows(num_tokens: int, length: int) -> int:
    """Rows of `length` that a stream of `num_tokens` fills, the last one perhaps in part."""
    return -(-(num_tokens - 1) // length)


def pack_row(
    stream: DocumentStream, row: int, length: int, pad_id: int
) -> dict[str, Integer[np.ndarray, "T"] | np.ndarray]:
    """Returns row `row` as the fields of a `Batch`, each [T] with T = `length`.

    Args:
      stream: the documents.
      row: 0 .. count_rows - 1.
      length: T.
      pad_id: fills the inputs and targets that the stream does not.
    """
    first = row * length
    place = np.arange(first, min(first + length + 1, int(stream.bounds[-1])))
    document = np.searchsorted(stream.bounds, place, side="right") - 1
    begin = stream.bounds[document]
    ids = stream.tokens[stream.begins[document] + place - begin].astype(np.int32)
    count = len(place) - 1
    fields = {
        name: np.full(length, fill, dtype)
        for name, fill, dtype in (
            ("inputs", pad_id, np.int32),
            ("targets", pad_id, np.int32),
            ("segments", 0, np.int32),
            ("positions", 0, np.int32),
            ("weights", 0, np.float32),
        )
    }
    fields["inputs"][:count] = ids[:-1]
    fields["targets"][:count] = ids[1:]
    fields["segments"][:count] = (document - document[0] + 1)[:-1]
    fields["positions"][:count] = (place - np.maximum(begin, first))[:-1]
    fields["weights"][:count] = document[1:] == document[:-1]
    return fields


def permutation(size: int, *seeds: int) -> Int[np.ndarray, "size"]:
    """Returns 0 .. size - 1 in an order that depends on `size` and `seeds` alone.

    The order sorts the outputs of SplitMix64 (Steele et al. 2014), so that it is the same under
    every version of NumPy, whose own generators do not promise that.
    """
    state = np.zeros(1, np.uint64)
    for seed in seeds:
        state = _mix(state + _GOLDEN_GAMMA + np.uint64(seed))
    counter = np.arange(1, size + 1, dtype=np.uint64)
    return np.argsort(_mix(state + counter * _GOLDEN_GAMMA), kind="stable")


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
