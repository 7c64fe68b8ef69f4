"""What every tokenizer can do, the byte tokenizer, and the choice among all of them."""

import abc
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np

from kimi_jax.core.errors import require

REPLACEMENT = "\ufffd"


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    Attributes:
      vocab_size: number of ids; they are 0 .. vocab_size - 1.
      bos_id: starts every document.
      eos_id: ends every document.
      pad_id: fills rows that no document fills.
      token_byte_lengths: int32 [vocab_size], bytes of text each id stands for, 0 for special ones.
      fingerprint: equal for equal tokenizers, different for different ones.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    token_byte_lengths: np.ndarray
    fingerprint: str

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, an integer array [T]; never a special one."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of `ids`.

        Special ids stand for no text. What is not valid UTF-8, and ids outside the vocabulary (a
        model's may be larger), become U+FFFD.
        """

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`; never a special one."""
        return self.encode_batch([text])[0].tolist()

    @property
    def token_dtype(self) -> type[np.unsignedinteger]:
        """The smallest format that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, then begin, end and padding."""

    def __init__(self):
        self.vocab_size = 259
        self.bos_id, self.eos_id, self.pad_id = 256, 257, 258
        self.token_byte_lengths = (np.arange(259) < 256).astype(np.int32)
        self.fingerprint = "bytes-1"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        return join_bytes([bytes([i]) for i in range(256)] + [b""] * 3, ids)


def join_bytes(token_bytes: Sequence[bytes], ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of `ids` where id i stands for `token_bytes[i]`."""
    unknown = REPLACEMENT.encode()
    size = len(token_bytes)
    parts = (token_bytes[i] if 0 <= i < size else unknown for i in map(int, ids))
    return b"".join(parts).decode(errors="replace")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ConfigError` if a model with `vocab_size` rows cannot embed every id."""
    require(
        tokenizer.vocab_size <= vocab_size,
        f"model.vocab_size is {vocab_size}, but the tokenizer of data.tokenizer has "
        f"{tokenizer.vocab_size} ids; set model.vocab_size to at least {tokenizer.vocab_size}, "
        "or choose another data.tokenizer",
    )
