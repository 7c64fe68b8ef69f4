"""Any tokenizer.json, read and run by `tokenizers`."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from kimi_jax.core.errors import DataError
from kimi_jax.data.tokenizer import REPLACEMENT, Tokenizer

# Used where no tokenizer_config.json beside the file names them.
_USUAL_BOS = ("<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
_USUAL_EOS = ("</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")
_USUAL_PAD = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")


class FileTokenizer(Tokenizer):
    """A tokenizer.json.

    Begin, end and padding are those of the tokenizer_config.json beside it, or else the usual
    names. A tokenizer without a begin token begins documents with its end token, and one without
    padding pads with it.

    Args:
      path: the tokenizer.json.

    Raises:
      DataError: the file is missing or malformed, or has no token that ends a document.
    """

    def __init__(self, path: str):
        from tokenizers import Tokenizer as Library

        file = pathlib.Path(path).expanduser()
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DataError(f"data.tokenizer.path: cannot read {file}: {error}") from error
        try:
            self._library = Library.from_str(raw.decode())
            description = json.loads(raw)
        except Exception as error:  # noqa: BLE001 - `tokenizers` raises bare Exceptions
            raise DataError(f"data.tokenizer.path: {file} is no tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        # The name of a special token in a text is text.
        self._library.encode_special_tokens = True
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._set_roles(file, vocab)
        self.token_byte_lengths = _byte_lengths(description, vocab, self.vocab_size)
        self.fingerprint = hashlib.blake2b(
            raw + repr((self.bos_id, self.eos_id, self.pad_id)).encode(), digest_size=16
        ).hexdigest()

    def _set_roles(self, file: pathlib.Path, vocab: dict[str, int]) -> None:
        named = _read_roles(file.with_name("tokenizer_config.json"))

        def find(role: str, usual: tuple[str, ...]) -> int | None:
            names = [named[role]] if role in named else usual
            return next((vocab[name] for name in names if name in vocab), None)

        eos = find("eos_token", _USUAL_EOS)
        if eos is None:
            raise DataError(
                f"{file} has no token that ends a document: none of {', '.join(_USUAL_EOS)}; "
                "name one as eos_token in a tokenizer_config.json beside it"
            )
        bos, pad = find("bos_token", _USUAL_BOS), find("pad_token", _USUAL_PAD)
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        self.pad_id = eos if pad is None else pad

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """See `Tokenizer`."""
        parts, known = [], []
        for i in map(int, ids):
            if 0 <= i < self.vocab_size:
                known.append(i)
            else:
                parts += [self._library.decode(known), REPLACEMENT]
                known = []
        return "".join([*parts, self._library.decode(known)])


def _read_roles(file: pathlib.Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
        entries = {role: config.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{file} is not a JSON object: {error}") from error
    names = {
        role: entry["content"] if isinstance(entry, dict) else entry
        for role, entry in entries.items()
    }
    return {role: name for role, name in names.items() if name is not None}


def _byte_lengths(description: dict[str, Any], vocab: dict[str, int], size: int) -> np.ndarray:
    """Returns the bytes of text of each id, as far as the vocabulary's spelling tells them."""
    byte_level = '"ByteLevel"' in json.dumps(description.get("decoder"))
    special = {token["content"] for token in description["added_tokens"] if token["special"]}
    lengths = np.zeros(size, np.int32)
    for token, i in vocab.items():
        if token in special:
            continue
        if byte_level:  # one letter of the alphabet per byte
            lengths[i] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[i] = 1
        else:
            lengths[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    return lengths
