"""Byte-level BPE: trained on the corpus with `tokenizers`, run by tiktoken, which is faster."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from kimi_jax.core.errors import DataError
from kimi_jax.data.cache import fingerprint
from kimi_jax.data.tokenizer import Tokenizer, join_bytes

BPE_SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")

# How `tokenizers` cuts text into words for a byte-level BPE: the pattern of GPT-2.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken gives up on longer texts, and on longer runs with or without a space; the limits are
# those of Kimi's own tokenizer.
_MAX_CHARACTERS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(rf"\S{{{_MAX_RUN}}}|\s{{{_MAX_RUN}}}")


class BpeTokenizer(Tokenizer):
    """Byte-level BPE from ranks, a pattern and special tokens.

    Args:
      ranks: bytes of each ordinary token to its id, which is also its rank among the merges.
      pattern: cuts text into words, inside which bytes are merged.
      specials: name of each special token to its id.
      roles: names of the special tokens that begin a document, end it, and fill rows.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        specials: Mapping[str, int],
        roles: tuple[str, str, str],
    ):
        import tiktoken

        self.vocab_size = len(ranks) + len(specials)
        self.bos_id, self.eos_id, self.pad_id = (specials[name] for name in roles)
        self._bytes = [b""] * self.vocab_size
        for token, i in ranks.items():
            self._bytes[i] = token
        self.token_byte_lengths = np.array([len(token) for token in self._bytes], np.int32)
        self.specials = dict(specials)
        self._encoding = tiktoken.Encoding(
            "kimi_jax", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )
        self.fingerprint = fingerprint(
            ["bpe", pattern, self.specials, roles, [token.hex() for token in self._bytes]]
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`; a special token's name in a text is text."""
        pieces = [split_long(text) for text in texts]
        flat = [piece for text_pieces in pieces for piece in text_pieces]
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
        return [
            np.concatenate([np.asarray(next(encoded), np.int64) for _ in text_pieces])
            if text_pieces
            else np.zeros(0, np.int64)
            for text_pieces in pieces
        ]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        return join_bytes(self._bytes, ids)


def split_long(text: str) -> list[str]:
    """Cuts a text into pieces that tiktoken can take; most texts are one piece."""
    pieces = []
    for start in range(0, len(text), _MAX_CHARACTERS):
        chunk = text[start : start + _MAX_CHARACTERS]
        cuts = [0, *(match.end() for match in _RUN.finditer(chunk)), len(chunk)]
        pieces += [chunk[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b]
    return pieces


def train_bpe(texts: Iterable[str], vocab_size: int, file: pathlib.Path) -> None:
    """Trains a byte-level BPE and writes it as a tokenizer.json.

    Args:
      texts: the sample to train on.
      vocab_size: ids, with 256 bytes and the special tokens; the last ids.
      file: where to write.

    Raises:
      DataError: the texts have too few words for so many ids.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    num_ordinary = vocab_size - len(BPE_SPECIALS)
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < num_ordinary:
        most = library.get_vocab_size() + len(BPE_SPECIALS)
        raise DataError(
            f"the corpus is too small for data.tokenizer.vocab_size {vocab_size}: it gives "
            f"{most} ids; set data.tokenizer.vocab_size to at most {most}"
        )
    library.add_special_tokens(list(BPE_SPECIALS))
    library.save(str(file))


def load_bpe(file: pathlib.Path) -> BpeTokenizer:
    """Reads what `train_bpe` wrote."""
    vocab = json.loads(file.read_text())["model"]["vocab"]
    byte_of = byte_of_letter()
    ranks = {bytes(byte_of[letter] for letter in token): i for token, i in vocab.items()}
    specials = {name: len(ranks) + i for i, name in enumerate(BPE_SPECIALS)}
    return BpeTokenizer(ranks, WORD_PATTERN, specials, BPE_SPECIALS)


def byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable Latin-1 stays, others follow at 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
