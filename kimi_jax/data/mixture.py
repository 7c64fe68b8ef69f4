"""Rows of a source by number, epoch after epoch, and rows of several sources in proportion."""

import functools
import zlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from kimi_jax.data.packing import DocumentStream, arrange, count_rows, pack_row, permutation
from kimi_jax.data.token_store import TokenStore

_EPOCHS = 1 << 20  # more than any run lasts; grain wants a length
_ORDER_OF_DOCUMENTS, _ORDER_OF_ROWS = 0, 1
_EPOCHS_IN_MEMORY = 2  # threads may be on both sides of the end of one


class RowSource:
    """The packed rows of one source, for grain: row i is a pure function of i.

    In each epoch the documents are put in a new order, packed, and the rows put in a new order, so
    that a batch is not one long document.

    Args:
      store: the documents.
      length: T, tokens in a row.
      pad_id: fills the last row of an epoch.
      seed: of all orders.
      name: of the source, so that sources of equal size have different orders.
    """

    def __init__(self, store: TokenStore, *, length: int, pad_id: int, seed: int, name: str):
        self._store = store
        self._options = {"length": length, "pad_id": pad_id, "seed": seed, "name": name}
        self._seeds = (seed, zlib.crc32(name.encode()))
        self.rows_per_epoch = count_rows(store.num_tokens, length)
        self._epoch = functools.lru_cache(maxsize=_EPOCHS_IN_MEMORY)(self._arrange_epoch)

    def __reduce__(self):
        return functools.partial(RowSource, **self._options), (self._store,)

    def __len__(self) -> int:
        return self.rows_per_epoch * _EPOCHS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, row = divmod(int(index), self.rows_per_epoch)
        stream, rows = self._epoch(epoch)
        length, pad_id = self._options["length"], self._options["pad_id"]
        return pack_row(stream, int(rows[row]), length, pad_id)

    def _arrange_epoch(self, epoch: int) -> tuple[DocumentStream, np.ndarray]:
        store = self._store
        documents = permutation(store.num_documents, *self._seeds, epoch, _ORDER_OF_DOCUMENTS)
        stream = arrange(store.tokens, store.offsets, documents)
        return stream, permutation(self.rows_per_epoch, *self._seeds, epoch, _ORDER_OF_ROWS)


class PartOfBatches:
    """The rows that one process makes of every batch, for grain: a pure function of the index.

    Args:
      rows: of all batches, one after the other.
      batch_sequences: rows in a batch.
      part: which of them, such as 4, 5, 6 and 7.
    """

    def __init__(self, rows: grain.MapDataset, batch_sequences: int, part: Sequence[int]):
        self._rows = rows
        self._batch_sequences = batch_sequences
        self._part = tuple(part)

    def __len__(self) -> int:
        return len(self._rows) // self._batch_sequences * len(self._part)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, place = divmod(int(index), len(self._part))
        return self._rows[batch * self._batch_sequences + self._part[place]]


def mix_rows(sources: Mapping[str, RowSource], weights: Mapping[str, float]) -> grain.MapDataset:
    """Returns a dataset whose rows come from `sources` in the proportions of `weights`.

    Args:
      sources: rows of each source.
      weights: positive; grain rounds their ratios to 1 % of the smallest.
    """
    names = sorted(sources)
    datasets = [grain.MapDataset.source(sources[name]) for name in names]
    if len(datasets) == 1:
        return datasets[0]
    return grain.MapDataset.mix(datasets, [weights[name] for name in names])
