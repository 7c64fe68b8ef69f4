"""Which documents are held out, which of those are measured, and how far compression gets on them.

All choices are by hash, so that they depend neither on the order of reading nor on a seed.
"""

import hashlib
import heapq
import math
import zlib

import numpy as np

from kimi_jax.data.documents import Document

_HELD_OUT_SALT = b"held out"
_HASH_BYTES = 8


def hash_fraction(text: str, salt: bytes) -> float:
    """Returns a number in [0, 1) that depends on `text` and `salt` alone."""
    digest = hashlib.blake2b(
        text.encode(errors="surrogatepass"), digest_size=_HASH_BYTES, key=salt
    ).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def is_held_out(text: str, fraction: float) -> bool:
    """True if the document with this text belongs to the share that training never sees.

    The text decides and not its name, so that a copy under another name is held out as well.
    """
    return hash_fraction(text, _HELD_OUT_SALT) < fraction


class HashSample:
    """Keeps the documents with the lowest hashes, as many as fit in `max_bytes`, at least one.

    In order of their hashes, documents are kept until the first that does not fit, so the result
    does not depend on the order of `offer`. Memory stays near `max_bytes`.
    """

    def __init__(self, max_bytes: int, salt: bytes):
        self._max_bytes = max_bytes
        self._salt = salt
        self._heap: list[tuple[float, str, Document]] = []  # highest hash first
        self._bytes = 0
        self._bound = math.inf  # lowest hash that did not fit

    def offer(self, document: Document) -> None:
        """Considers a document."""
        rank = hash_fraction(document.name, self._salt)
        if rank >= self._bound:
            return
        heapq.heappush(self._heap, (-rank, document.name, document))
        self._bytes += document.num_bytes
        while self._bytes > self._max_bytes and len(self._heap) > 1:
            negative_rank, _, dropped = heapq.heappop(self._heap)
            self._bytes -= dropped.num_bytes
            self._bound = min(self._bound, -negative_rank)

    def documents(self) -> list[Document]:
        """Returns what was kept, in order of the hashes."""
        return [document for _, _, document in sorted(self._heap, reverse=True)]


def unigram_bits_per_byte(text: bytes) -> float:
    """Entropy of the bytes' frequencies, -sum_b p_b log2 p_b, in bits per byte."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    p = counts[counts > 0] / len(text)
    return float(-(p * np.log2(p)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `gzip -9` over the whole text, its 18 bytes of header included."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    size = len(compressor.compress(text)) + len(compressor.flush())
    return 8 * size / len(text)
