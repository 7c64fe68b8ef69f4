"""What to train on, how it becomes tokens, and how tokens become batches."""

import dataclasses
import enum
import types
from collections.abc import Mapping

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import require

NUM_BPE_BASE_TOKENS = 256 + 3  # every byte, and begin, end and padding


class TokenizerKind(enum.Enum):
    """What turns text into token ids."""

    BYTES = "bytes"  # one id per byte of UTF-8
    BPE = "bpe"  # byte-level BPE, trained on the corpus and cached
    FILE = "file"  # a tokenizer.json
    KIMI = "kimi"  # a tiktoken.model with Kimi's pattern and special tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
      kind: what turns text into ids.
      path: for `file`, the tokenizer.json; for `kimi`, the tiktoken.model or its folder.
      vocab_size: for `bpe`, how many ids to train, bytes and special tokens included.
    """

    kind: TokenizerKind = TokenizerKind.BYTES
    path: str | None = None
    vocab_size: int | None = None

    def __post_init__(self):
        section = "data.tokenizer"
        check_fields(self, section)
        kind = self.kind.value
        if self.kind in (TokenizerKind.FILE, TokenizerKind.KIMI):
            require(bool(self.path), f"{section}.kind {kind!r} needs {section}.path")
        else:
            require(
                self.path is None,
                f"{section}.path must be None for {section}.kind {kind!r}, got {self.path!r}",
            )
        if self.kind is TokenizerKind.BPE:
            require(
                self.vocab_size is not None and self.vocab_size >= NUM_BPE_BASE_TOKENS,
                f"{section}.kind 'bpe' needs {section}.vocab_size of at least "
                f"{NUM_BPE_BASE_TOKENS} (256 bytes and 3 special tokens), got {self.vocab_size}",
            )
        else:
            require(
                self.vocab_size is None,
                f"{section}.vocab_size must be None for {section}.kind {kind!r}, whose vocabulary "
                f"is fixed; got {self.vocab_size}",
            )


class SourceKind(enum.Enum):
    """What a source of documents is."""

    EMBEDDED = "embedded"  # the Python standard library's sources and documentation topics
    TEXT = "text"  # files of text or code, one document each
    JSONL = "jsonl"  # one JSON object per line, plain or gzip
    PARQUET = "parquet"  # one document per row
    ARRAY_RECORD = "array_record"  # one document per record, as UTF-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of the mixture.

    Attributes:
      kind: what the files are.
      path: a file, a folder (searched with its subfolders) or a glob; None for `embedded`.
      weight: share of the mixture's tokens, relative to the other sources' weights.
      text_field: for `jsonl` and `parquet`, the field that holds the text.
      suffixes: for a folder of `text`, which files to read, such as (".py", ".md"); empty takes the
        usual ones of text and code.
    """

    kind: SourceKind = SourceKind.EMBEDDED
    path: str | None = None
    weight: float = 1.0
    text_field: str = "text"
    suffixes: tuple[str, ...] = ()

    def __post_init__(self):
        section = "data.sources.*"
        check_fields(self, section)
        require_positive(self, section, "weight")
        kind = self.kind.value
        if self.kind is SourceKind.EMBEDDED:
            require(
                self.path is None,
                f"{section}.path must be None for {section}.kind 'embedded', got {self.path!r}",
            )
        else:
            require(bool(self.path), f"{section}.kind {kind!r} needs {section}.path")
        require(
            self.text_field == "text" or self.kind in (SourceKind.JSONL, SourceKind.PARQUET),
            f"{section}.text_field {self.text_field!r} has no meaning for {section}.kind {kind!r}, "
            "whose documents have no fields; leave it out",
        )
        require(
            not self.suffixes or self.kind is SourceKind.TEXT,
            f"{section}.suffixes {self.suffixes!r} has no meaning for {section}.kind {kind!r}; "
            "leave it out",
        )
        for suffix in self.suffixes:
            require(
                suffix.startswith("."),
                f"{section}.suffixes must start with a dot, such as '.txt'; got {suffix!r}",
            )


def _embedded_only() -> Mapping[str, SourceConfig]:
    return {"embedded": SourceConfig()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus and its batches.

    Attributes:
      tokenizer: what turns text into ids.
      sources: the mixture, by names of the user's choice.
      sequence_length: T, tokens in a row of a batch.
      seed: of the order of documents and rows.
      held_out_fraction: share of the documents, chosen by a hash of their text, that training
        never sees; 0 holds out none, and there is no evaluation.
      held_out_max_bytes: how much held-out text of each source is measured, so that evaluation
        stays affordable; what is beyond it is still not trained on.
      train_max_bytes: how much text of each source is trained on, over and over: pages of 4 T
        characters that a hash chooses, so that little text comes of many documents and a long one
        does not fill it; at least one page. None takes all. A BPE is trained on all in any case.
      cache_dir: folder of tokenised corpora and trained tokenizers; None takes `kimi_jax` in the
        user's cache folder.
      num_threads: threads that prepare batches ahead, in each process; 0 prepares none ahead.
      num_workers: processes that prepare batches; 0 uses the training process.
      prefetch: batches prepared ahead, in each process.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    # Without a hash of its own; equal configs still have equal hashes.
    sources: Mapping[str, SourceConfig] = dataclasses.field(
        default_factory=_embedded_only, hash=False
    )
    sequence_length: int
    seed: int = 0
    held_out_fraction: float = 0.02
    held_out_max_bytes: int = 256 * 1024
    train_max_bytes: int | None = None
    cache_dir: str | None = None
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        check_fields(self, "data")
        object.__setattr__(self, "sources", types.MappingProxyType(dict(self.sources)))
        limits = ("held_out_max_bytes", "train_max_bytes")
        require_positive(self, "data", "sequence_length", *limits, "prefetch")
        for name in ("seed", "num_threads", "num_workers"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name} must not be negative, got {value}")
        require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction must be in [0, 1), got {self.held_out_fraction}",
        )
        require(bool(self.sources), "data.sources must name at least one source, got none")
        for name in self.sources:
            require(
                isinstance(name, str) and bool(name),
                f"data.sources must have non-empty names, got {name!r}",
            )
