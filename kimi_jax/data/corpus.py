"""Opens a corpus: documents are read and tokenised once, then mapped from the cache."""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from kimi_jax.configs.data import DataConfig, SourceConfig, TokenizerKind
from kimi_jax.core.errors import DataError
from kimi_jax.data.bpe_tokenizer import load_bpe, train_bpe
from kimi_jax.data.cache import cache_root, cached_folder, file_facts, fingerprint
from kimi_jax.data.documents import Document, pages
from kimi_jax.data.file_tokenizer import FileTokenizer
from kimi_jax.data.held_out import HashSample, is_held_out
from kimi_jax.data.kimi_tokenizer import kimi_files, load_kimi
from kimi_jax.data.reading_progress import with_progress
from kimi_jax.data.sources import read_documents, source_files
from kimi_jax.data.token_store import TokenStore, write_token_store
from kimi_jax.data.tokenizer import ByteTokenizer, Tokenizer

_FORMAT = 2  # of everything in the cache; a change makes all of it anew
_MEASURED_SALT = b"measured"
_BPE_SALT = b"bpe sample"
_TRAINED_SALT = b"trained on"
_CHARACTERS_PER_TOKEN = 4  # of a trained vocabulary, in English
_BPE_SAMPLE_BYTES = 8 << 20
_BPE_SAMPLE_CHARACTERS = 256 << 10  # of one document, so that no single one fills the sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTokens:
    """One source, tokenised.

    Attributes:
      train: the documents to train on.
      held_out: held-out documents that are measured.
      held_out_text: file with the text of `held_out`.
    """

    train: TokenStore
    held_out: TokenStore
    held_out_text: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
      tokenizer: what its ids mean.
      sources: its parts, by the names in `data.sources`.
    """

    tokenizer: Tokenizer
    sources: Mapping[str, SourceTokens]

    def statistics(self) -> dict[str, int]:
        """Returns documents, tokens and bytes of each part, like `python/train_tokens`."""
        return {
            f"{name}/{part}_{unit}": getattr(store, f"num_{unit}")
            for name, source in self.sources.items()
            for part, store in (("train", source.train), ("held_out", source.held_out))
            for unit in ("documents", "tokens", "bytes")
        }


def open_corpus(config: DataConfig) -> Corpus:
    """Returns the corpus of `config`, tokenising what the cache does not have.

    Raises:
      DataError: a source or tokenizer is missing, unreadable, malformed or empty.
    """
    tokenizer = open_tokenizer(config)
    sources = {
        name: _open_source(source, f"data.sources.{name}", config, tokenizer)
        for name, source in config.sources.items()
    }
    corpus = Corpus(tokenizer=tokenizer, sources=sources)
    if config.held_out_fraction and not any(s.held_out.num_documents for s in sources.values()):
        documents = sum(source.train.num_documents for source in sources.values())
        raise DataError(
            f"data.held_out_fraction {config.held_out_fraction} holds out none of the corpus's "
            f"{documents} documents; raise it, or set it to 0 to train without evaluation"
        )
    return corpus


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Returns the tokenizer of `config`, trained first if it is a BPE that the cache lacks."""
    match config.tokenizer.kind:
        case TokenizerKind.BYTES:
            return ByteTokenizer()
        case TokenizerKind.FILE:
            return FileTokenizer(config.tokenizer.path)
        case TokenizerKind.KIMI:
            return load_kimi(config.tokenizer.path)
        case TokenizerKind.BPE:
            return _open_bpe(config)


def tokenizer_files(config: DataConfig) -> list[pathlib.Path]:
    """Returns the files that other programs need to read what `open_tokenizer` writes.

    None for bytes. A BPE is trained first, if the cache lacks it.
    """
    match config.tokenizer.kind:
        case TokenizerKind.BYTES:
            return []
        case TokenizerKind.FILE:
            return [pathlib.Path(config.tokenizer.path).expanduser()]
        case TokenizerKind.KIMI:
            return kimi_files(config.tokenizer.path)
        case TokenizerKind.BPE:
            return [_bpe_file(config)]


def _open_bpe(config: DataConfig) -> Tokenizer:
    return load_bpe(_bpe_file(config))


def _bpe_file(config: DataConfig) -> pathlib.Path:
    """Returns the file of a BPE, trained first if the cache lacks it."""
    sources = {f"data.sources.{name}": source for name, source in config.sources.items()}
    facts = [
        *("bpe", _FORMAT, config.tokenizer.vocab_size, config.held_out_fraction),
        [_source_facts(source, option) for option, source in sources.items()],
    ]

    def train(folder: pathlib.Path) -> None:
        sample = HashSample(_BPE_SAMPLE_BYTES, _BPE_SALT)
        for option, source in sources.items():
            documents = read_documents(source, option)
            for document in with_progress(documents, f"sampling {option} for the tokenizer"):
                if not is_held_out(document.text, config.held_out_fraction):
                    text = document.text[:_BPE_SAMPLE_CHARACTERS]
                    sample.offer(Document(document.name, text, len(text.encode())))
        texts = (document.text for document in sample.documents())
        train_bpe(texts, config.tokenizer.vocab_size, folder / "tokenizer.json")

    folder = cache_root(config.cache_dir) / "tokenizers" / fingerprint(facts)
    return cached_folder(folder, train) / "tokenizer.json"


def _source_facts(source: SourceConfig, option: str) -> list:
    return [source.kind.value, source.text_field, file_facts(source_files(source, option))]


def _open_source(
    source: SourceConfig, option: str, config: DataConfig, tokenizer: Tokenizer
) -> SourceTokens:
    facts = [
        *("tokens", _FORMAT, _source_facts(source, option), tokenizer.fingerprint),
        *(config.held_out_fraction, config.held_out_max_bytes),
    ]
    if config.train_max_bytes is not None:
        facts += ["train_max_bytes", config.train_max_bytes, _page_characters(config)]

    def fill(folder: pathlib.Path) -> None:
        measured = HashSample(config.held_out_max_bytes, _MEASURED_SALT)

        def training_documents() -> Iterator[Document]:
            for document in read_documents(source, option):
                if is_held_out(document.text, config.held_out_fraction):
                    measured.offer(document)
                else:
                    yield document

        documents = _limit(with_progress(training_documents(), f"tokenising {option}"), config)
        write_token_store(folder / "train", documents, tokenizer)
        if not TokenStore(folder / "train").num_documents:
            raise DataError(
                f"{option} has no documents to train on: its files are empty, or "
                f"data.held_out_fraction {config.held_out_fraction} holds all of them out"
            )
        held_out = measured.documents()
        write_token_store(folder / "held_out", held_out, tokenizer)
        text = b"".join(document.text.encode() for document in held_out)
        (folder / "held_out_text").write_bytes(text)

    folder = cached_folder(cache_root(config.cache_dir) / "tokens" / fingerprint(facts), fill)
    return SourceTokens(
        train=TokenStore(folder / "train"),
        held_out=TokenStore(folder / "held_out"),
        held_out_text=folder / "held_out_text",
    )


def _limit(documents: Iterable[Document], config: DataConfig) -> Iterable[Document]:
    """Returns the documents, or pages of them that a hash chooses, as many as may be trained on.

    A row is all that a model reads of a document at once. So pages of about a row lose nothing, and
    make little text as varied as it can be: a few whole documents repeat themselves.
    """
    if config.train_max_bytes is None:
        return documents
    sample = HashSample(config.train_max_bytes, _TRAINED_SALT)
    for document in documents:
        for page in pages(document, _page_characters(config)):
            sample.offer(page)
    return sample.documents()


def _page_characters(config: DataConfig) -> int:
    return _CHARACTERS_PER_TOKEN * config.sequence_length
