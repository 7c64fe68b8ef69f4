"""Batches to train on, by step, and batches to measure on."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from kimi_jax.configs.data import DataConfig
from kimi_jax.core.errors import DataError
from kimi_jax.data.batches import Batch, pad_batch
from kimi_jax.data.cache import fingerprint
from kimi_jax.data.corpus import Corpus
from kimi_jax.data.held_out import gzip_bits_per_byte, unigram_bits_per_byte
from kimi_jax.data.mixture import PartOfBatches, RowSource, mix_rows
from kimi_jax.data.packing import arrange, count_rows, pack_row


class BatchIterator:
    """Endless batches, prepared ahead; batch k is a pure function of corpus, config and k.

    Args:
      batches: batch k at index k.
      config: how many threads and processes prepare them.
      stream: fingerprint of everything that the batches depend on.
    """

    def __init__(self, batches: grain.MapDataset, config: DataConfig, stream: str):
        self._batches = batches
        self._config = config
        self._stream = stream
        self._step = 0
        self._running: list[grain.DatasetIterator] = []  # none or one
        # Stops threads and processes when this object goes, at the latest when Python ends.
        weakref.finalize(self, _stop, self._running)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if not self._running:
            self._running.append(iter(self._read_ahead()))
        batch = next(self._running[0])
        if self._config.num_workers:  # it lies in memory shared with a worker, which this frees
            batch = jax.tree.map(np.array, batch)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns which batch is next, as a JSON value for `set_state`."""
        return {"step": self._step, "stream": self._stream}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the batch that was next when `get_state` returned `state`.

        Raises:
          DataError: the state belongs to another corpus, tokenizer, mixture, seed or batch size.
        """
        if state["stream"] != self._stream:
            raise DataError(
                "the saved position belongs to other batches: the corpus, data.tokenizer, "
                "data.sources, data.sequence_length, data.seed, data.held_out_fraction, "
                "data.train_max_bytes or training.batch_sequences differs from the run that saved "
                "it; restore them, or start in a new work directory"
            )
        if state["step"] != self._step:
            self.close()
            self._step = state["step"]

    def close(self) -> None:
        """Stops what prepares batches ahead; the next batch starts it again."""
        _stop(self._running)

    def _read_ahead(self) -> grain.IterDataset:
        config = self._config
        ahead = config.prefetch if config.num_threads else 0
        options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=ahead)
        batches = self._batches[self._step :].to_iter_dataset(options)
        if not config.num_workers:
            return batches
        # grain's worker processes read flags, which only absl programs have parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=config.prefetch
            )
        )


def _stop(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def train_batches(
    corpus: Corpus, config: DataConfig, batch_sequences: int, part: Sequence[int] | None = None
) -> BatchIterator:
    """Returns the training batches, from step 0.

    Args:
      corpus: the opened `config`.
      config: what is read, and how.
      batch_sequences: rows in a batch of the whole run.
      part: which of them to make; None makes all.
    """
    part = range(batch_sequences) if part is None else part
    sources = {
        name: RowSource(
            source.train,
            length=config.sequence_length,
            pad_id=corpus.tokenizer.pad_id,
            seed=config.seed,
            name=name,
        )
        for name, source in corpus.sources.items()
    }
    weights = {name: config.sources[name].weight for name in sources}
    rows = PartOfBatches(mix_rows(sources, weights), batch_sequences, part)
    facts = [
        {name: [corpus.sources[name].train.content, weights[name]] for name in sources},
        *(corpus.tokenizer.fingerprint, config.sequence_length, config.seed, batch_sequences),
    ]
    batches = grain.MapDataset.source(rows).batch(len(part), drop_remainder=True).map(_to_batch)
    return BatchIterator(batches, config, fingerprint(facts))


def _to_batch(fields: dict[str, np.ndarray]) -> Batch:
    return Batch(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out text in a fixed order; iterate it as often as wanted.

    Attributes:
      batches: every held-out token, the last batch padded.
      num_documents: how many documents.
      num_tokens: tokens whose prediction is measured: the sum of all weights.
      num_bytes: of the text, to turn a summed loss into bits per byte.
      unigram_bits_per_byte: entropy of its bytes' frequencies.
      gzip_bits_per_byte: what `gzip -9` makes of it.
    """

    batches: tuple[Batch, ...]
    num_documents: int
    num_tokens: int
    num_bytes: int
    unigram_bits_per_byte: float
    gzip_bits_per_byte: float


def held_out_batches(corpus: Corpus, config: DataConfig, batch_sequences: int) -> HeldOut:
    """Returns the held-out text of all sources in batches of `batch_sequences` rows.

    Raises:
      DataError: nothing is held out.
    """
    stores = [source.held_out for source in corpus.sources.values()]
    num_documents = sum(store.num_documents for store in stores)
    if not num_documents:
        raise DataError(
            "no documents are held out; raise data.held_out_fraction to measure on some"
        )
    lengths = np.concatenate([np.diff(store.offsets) for store in stores])
    tokens = np.concatenate([store.tokens for store in stores])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    stream = arrange(tokens, offsets, np.arange(num_documents))
    pad_id = corpus.tokenizer.pad_id
    rows = [
        pack_row(stream, row, config.sequence_length, pad_id)
        for row in range(count_rows(len(tokens), config.sequence_length))
    ]
    batches = tuple(
        _stack(rows[start : start + batch_sequences], batch_sequences, pad_id)
        for start in range(0, len(rows), batch_sequences)
    )
    text = b"".join(source.held_out_text.read_bytes() for source in corpus.sources.values())
    return HeldOut(
        batches=batches,
        num_documents=num_documents,
        num_tokens=len(tokens) - num_documents,
        num_bytes=len(text),
        unigram_bits_per_byte=unigram_bits_per_byte(text),
        gzip_bits_per_byte=gzip_bits_per_byte(text),
    )


def _stack(rows: list[dict[str, np.ndarray]], num_rows: int, pad_id: int) -> Batch:
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return pad_batch(Batch(**fields), num_rows, pad_id)
