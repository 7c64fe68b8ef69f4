"""Kimi K2's tokenizer from its published files: tiktoken.model and tokenizer_config.json.

Source: `tokenization_kimi.py` of the published checkpoints.
"""

import base64
import binascii
import json
import pathlib

from kimi_jax.core.errors import DataError
from kimi_jax.data.bpe_tokenizer import BpeTokenizer

NUM_SPECIALS = 256
_ROLES = ("[BOS]", "[EOS]", "[PAD]")

# Letters that may begin or continue a word, Chinese characters apart.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def load_kimi(path: str) -> BpeTokenizer:
    """Reads the tokenizer.

    Args:
      path: the tiktoken.model, or the folder it lies in; tokenizer_config.json lies beside it.

    Raises:
      DataError: a file is missing or malformed.
    """
    model, config = kimi_files(path)
    ranks = read_ranks(model)
    return BpeTokenizer(ranks, PATTERN, read_specials(config, len(ranks)), _ROLES)


def kimi_files(path: str) -> list[pathlib.Path]:
    """Returns the two files of the tokenizer; `path` is that of `load_kimi`."""
    file = pathlib.Path(path).expanduser()
    file = file / "tiktoken.model" if file.is_dir() else file
    return [file, file.with_name("tokenizer_config.json")]


def _read(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data.tokenizer.path: cannot read {file}: {error}") from error


def read_ranks(file: pathlib.Path) -> dict[bytes, int]:
    """Returns the bytes of each ordinary token to its id, from a tiktoken.model."""
    ranks = {}
    for number, line in enumerate(_read(file).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{file} line {number} is not a token in base64 and its rank: {error}"
            ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{file} must have the ranks 0, 1, 2, ... once each, and has others")
    return ranks


def read_specials(file: pathlib.Path, num_ordinary: int) -> dict[str, int]:
    """Returns name to id of the reserved ids, which follow the ordinary ones.

    Args:
      file: the tokenizer_config.json.
      num_ordinary: how many those are.
    """
    try:
        listed = json.loads(_read(file))["added_tokens_decoder"]
        names = {int(i): token["content"] for i, token in listed.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} must list the special tokens under 'added_tokens_decoder': {error!r}"
        ) from error
    reserved = range(num_ordinary, num_ordinary + NUM_SPECIALS)
    stray = sorted(set(names) - set(reserved))
    if stray:
        raise DataError(
            f"{file} has special tokens at {stray[:5]}, outside the {NUM_SPECIALS} ids from "
            f"{num_ordinary} on that follow the ranks of tiktoken.model"
        )
    specials = {names.get(i, f"<|reserved_token_{i}|>"): i for i in reserved}
    missing = [name for name in _ROLES if name not in specials]
    if missing:
        raise DataError(f"{file} lacks the special tokens {', '.join(missing)}")
    return specials
