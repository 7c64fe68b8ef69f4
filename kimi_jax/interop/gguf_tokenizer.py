"""A tokenizer and chat template in the form in which llama.cpp keeps them: inside the model's file.

llama.cpp knows byte-level BPE by its tokens, its merges, and the name of a pre-tokenizer that is
part of the program: a tokenizer whose words are cut in another way cannot be exported.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from kimi_jax.core.errors import DataError, require
from kimi_jax.data.bpe_tokenizer import byte_of_letter
from kimi_jax.data.file_tokenizer import FileTokenizer
from kimi_jax.data.kimi_tokenizer import read_ranks, read_specials

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_KIMI_END_OF_TURN = "<|im_end|>"

# The regular expressions by which a tokenizer.json cuts text, to llama.cpp's name for them. The
# first is what `tokenizers` does when it is given none.
_GPT_2 = ()
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
VOCABULARY_FILES = ("tiktoken.model", "tokenizer.json")  # the first that is there is read
_NAMES = {_GPT_2: "gpt-2", _LLAMA_3: "llama-bpe", _DEEPSEEK_V3: "deepseek-v3"}
_NO_NORMALIZER = {"type": "Sequence", "normalizers": []}
_IGNORES_MERGES = frozenset({"llama-bpe"})  # for words that are tokens as they stand


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A byte-level BPE tokenizer.

    Attributes:
      pre: llama.cpp's name of the way words are cut.
      tokens: id to token, ordinary ones in the alphabet of byte-level vocabularies.
      merges: pairs of tokens with a space between, the first to be merged first.
      control: ids that stand for no text, and that text means only where the caller says so.
      user_defined: ids whose names in a text always mean them.
      bos_id: begins a document.
      eos_id: ends a document.
      pad_id: fills rows.
      eot_id: ends a turn of a conversation; None leaves it to llama.cpp to find one.
      unk_id: stands for what is not in the vocabulary.
      add_bos: whether llama.cpp begins a prompt with `bos_id`.
      chat_template: in Jinja, or several as mappings with `name` and `template`.
    """

    pre: str
    tokens: Mapping[int, str]
    merges: Sequence[str]
    control: frozenset[int]
    user_defined: frozenset[int] = frozenset()
    bos_id: int
    eos_id: int
    pad_id: int
    eot_id: int | None = None
    unk_id: int | None = None
    add_bos: bool
    chat_template: str | Sequence[Mapping[str, str]] | None = None


def read_gguf_tokenizer(path: str | pathlib.Path) -> GgufTokenizer:
    """Reads a published tokenizer, with the chat template that lies beside it.

    Args:
      path: a folder with a tiktoken.model (Kimi's) or else a tokenizer.json, or one of these files.
        A tokenizer_config.json and a chat_template.jinja beside it are read too.

    Raises:
      DataError: a file is missing or malformed, or llama.cpp does not have such a tokenizer.
    """
    file = pathlib.Path(path).expanduser()
    if file.is_dir():
        found = [file / name for name in VOCABULARY_FILES]
        file = next((candidate for candidate in found if candidate.is_file()), None)
        if file is None:
            raise DataError(
                f"{path} has neither a tiktoken.model nor a tokenizer.json; name the folder of a "
                "tokenizer, or export without one"
            )
    return _read_json(file) if file.suffix == ".json" else _read_kimi(file)


def add_tokenizer(writer: Any, tokenizer: GgufTokenizer | None, vocab_size: int) -> None:
    """Describes a tokenizer to a `gguf.GGUFWriter`.

    Args:
      writer: whose file has not been opened.
      tokenizer: None for a model of ids without a vocabulary.
      vocab_size: rows of the model's embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
      ConfigError: the tokenizer has more ids than the model.
      DataError: two ids have one name, which llama.cpp refuses.
    """
    from gguf import TokenType

    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    count = max(tokenizer.tokens) + 1
    require(
        count <= vocab_size,
        f"the tokenizer has {count} ids and the model {vocab_size}; give the tokenizer that the "
        "model was trained with",
    )
    tokens = [tokenizer.tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(tokens)) < vocab_size:
        twice = sorted(token for token in set(tokens) if tokens.count(token) > 1)
        raise DataError(
            f"llama.cpp needs a name of its own for each id, and {', '.join(twice[:5])} stands "
            "for several"
        )

    def kind(i: int) -> TokenType:
        if i in tokenizer.control:
            return TokenType.CONTROL
        if i in tokenizer.user_defined:
            return TokenType.USER_DEFINED
        return TokenType.NORMAL if i in tokenizer.tokens else TokenType.UNUSED

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind(i)) for i in range(vocab_size)])
    writer.add_token_merges(list(tokenizer.merges))
    _add_roles(writer, tokenizer)


def _add_roles(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.eot_id is not None:
        writer.add_eot_token_id(tokenizer.eot_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _read_kimi(file: pathlib.Path) -> GgufTokenizer:
    ranks = read_ranks(file)
    specials = read_specials(file.with_name(_CONFIG_FILE), len(ranks))
    letter_of = {byte: letter for letter, byte in byte_of_letter().items()}

    def spell(token: bytes) -> str:
        return "".join(letter_of[byte] for byte in token)

    pairs = (halves(ranks, token) for token in sorted(ranks, key=ranks.__getitem__))
    return GgufTokenizer(
        pre="kimi-k2",
        tokens={i: spell(token) for token, i in ranks.items()}
        | {i: name for name, i in specials.items()},
        merges=[f"{spell(pair[0])} {spell(pair[1])}" for pair in pairs if pair is not None],
        control=frozenset(specials.values()),
        bos_id=specials["[BOS]"],
        eos_id=specials["[EOS]"],
        pad_id=specials["[PAD]"],
        eot_id=specials.get(_KIMI_END_OF_TURN),
        unk_id=specials.get("[UNK]"),
        add_bos=False,
        chat_template=_read_template(file.parent, _read_config(file.parent)),
    )


def halves(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """Returns the two tokens whose merging makes `token`, the last step of its own encoding.

    None for a single byte, and for a token that no merging reaches.

    Args:
      ranks: bytes of each token to its rank.
      token: one of them.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, limit) for a, b in zip(parts[:-1], parts[1:], strict=True)]
        first = min(joined)
        if first >= limit:
            return None
        at = joined.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _read_json(file: pathlib.Path) -> GgufTokenizer:
    roles = FileTokenizer(str(file))  # also checks that it is a tokenizer.json
    description = json.loads(file.read_bytes())
    config = _read_config(file.parent)
    pre = _pre_tokenizer(file, description)
    model, added = description["model"], description["added_tokens"]
    return GgufTokenizer(
        pre=pre,
        tokens={i: token for token, i in model["vocab"].items()}
        | {token["id"]: token["content"] for token in added},
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        control=frozenset(token["id"] for token in added if token["special"]),
        user_defined=frozenset(token["id"] for token in added if not token["special"]),
        bos_id=roles.bos_id,
        eos_id=roles.eos_id,
        pad_id=roles.pad_id,
        add_bos=config.get("add_bos_token", roles.bos_id != roles.eos_id),
        chat_template=_read_template(file.parent, config),
    )


def _pre_tokenizer(file: pathlib.Path, description: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name for what a tokenizer.json does before it merges.

    Raises:
      DataError: it has none.
    """
    model = description["model"]
    problem = None
    if model["type"] != "BPE":
        problem = f"its model is {model['type']}, not BPE"
    elif (description.get("normalizer") or _NO_NORMALIZER) != _NO_NORMALIZER:
        problem = "it normalises text"
    else:
        name = _NAMES.get(_word_patterns(description.get("pre_tokenizer")))
        if name is None:
            problem = "it cuts words by a pattern of its own"
        elif bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
            problem = f"its ignore_merges is not that of {name}"
        else:
            return name
    raise DataError(
        f"{file} cannot be exported: {problem}; llama.cpp runs byte-level BPE with the "
        f"pre-tokenizers {', '.join(sorted(_NAMES.values()))} and kimi-k2"
    )


def _word_patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Returns the expressions that cut words before bytes become letters; None for another form."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if splits else _GPT_2
    plain = all(
        step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]
        for step in splits
    )
    if not plain or not splits:
        return None
    return tuple(step["pattern"].get("Regex", "") for step in splits)


def _read_config(folder: pathlib.Path) -> Mapping[str, Any]:
    file = folder / _CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise DataError(f"{file} must hold a JSON object")
    return config


def _read_template(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> str | Sequence[Mapping[str, str]] | None:
    """Returns the chat template; one in a file of its own counts first, as in transformers."""
    file = folder / _TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
