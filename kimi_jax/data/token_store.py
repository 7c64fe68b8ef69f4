"""Token ids of many documents in one flat file, written once and mapped into memory."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np

from kimi_jax.data.documents import Document
from kimi_jax.data.tokenizer import Tokenizer

_ENCODE_BYTES_AT_ONCE = 4 << 20
_ENCODE_DOCUMENTS_AT_ONCE = 4096


class TokenStore:
    """Documents as tokens, each with begin and end: `[bos, ..., eos]`.

    Pickles as its folder's name, so that worker processes map the same file.

    Attributes:
      folder: where it lies.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __reduce__(self):
        return TokenStore, (self.folder,)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all documents, [W], uint16 or uint32, mapped from the file."""
        mode = "r" if self.num_documents else None  # an empty file cannot be mapped
        return np.load(self.folder / "tokens.npy", mmap_mode=mode)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]; document d is `tokens[offsets[d]:offsets[d + 1]]`."""
        return np.load(self.folder / "offsets.npy")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [documents], bytes of each text in UTF-8."""
        return np.load(self.folder / "byte_lengths.npy")

    @functools.cached_property
    def _facts(self) -> dict:
        return json.loads((self.folder / "facts.json").read_text())

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return self._facts["documents"]

    @property
    def num_tokens(self) -> int:
        """How many tokens, begins and ends included."""
        return self._facts["tokens"]

    @property
    def num_bytes(self) -> int:
        """How many bytes of text."""
        return self._facts["bytes"]

    @property
    def content(self) -> str:
        """A hash of the tokens and of where documents end."""
        return self._facts["content"]


def write_token_store(
    folder: pathlib.Path, documents: Iterable[Document], tokenizer: Tokenizer
) -> None:
    """Writes a `TokenStore` of `documents` to a new folder, holding a few MiB of them at a time."""
    folder.mkdir(parents=True)
    dtype = np.dtype(tokenizer.token_dtype).newbyteorder("<")
    digest = hashlib.blake2b(digest_size=16)
    token_lengths, byte_lengths = [], []
    with (folder / "tokens.npy").open("wb") as file:
        _write_header(file, dtype, 0)
        for batch in _batches(documents):
            for ids in tokenizer.encode_batch([document.text for document in batch]):
                row = np.empty(len(ids) + 2, dtype)
                row[0], row[1:-1], row[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
                raw = row.tobytes()
                file.write(raw)
                digest.update(raw)
                token_lengths.append(len(row))
            byte_lengths.extend(document.num_bytes for document in batch)
        # NumPy leaves room in the header for the length to grow.
        file.seek(0)
        _write_header(file, dtype, sum(token_lengths))
    offsets = np.cumsum([0, *token_lengths], dtype=np.int64)
    digest.update(offsets.tobytes())
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "byte_lengths.npy", np.asarray(byte_lengths, np.int64))
    facts = {
        "documents": len(token_lengths),
        "tokens": int(offsets[-1]),
        "bytes": sum(byte_lengths),
        "content": digest.hexdigest(),
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def _write_header(file: IO[bytes], dtype: np.dtype, length: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents so that the tokenizer's threads have enough to do."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _ENCODE_BYTES_AT_ONCE or len(batch) >= _ENCODE_DOCUMENTS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
