import base64
import dataclasses
import json
import pathlib
import tempfile

import gguf
from absl.testing import absltest, parameterized
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from kimi_jax.configs import presets
from kimi_jax.core.errors import ConfigError, DataError
from kimi_jax.data.bpe_tokenizer import byte_of_letter, train_bpe
from kimi_jax.data.file_tokenizer import FileTokenizer
from kimi_jax.data.kimi_tokenizer import load_kimi
from kimi_jax.interop.gguf import write_gguf
from kimi_jax.interop.gguf_encode import GgufType
from kimi_jax.interop.gguf_tokenizer import halves, read_gguf_tokenizer
from tests.support import published

WORDS = ("def", "return", "naïve", "x", "12345", "aaaa", "\n    ", "don't", "漢字", "banana")
TEXT = " ".join(WORDS) * 3
NUM_ORDINARY = 290
CONTROL, USER_DEFINED, NORMAL, UNUSED = 3, 4, 1, 5


class FolderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def train(self):
        train_bpe([TEXT, *WORDS], NUM_ORDINARY + 3, self.folder / "tokenizer.json")
        return json.loads((self.folder / "tokenizer.json").read_text())

    def write_json(self, **changes):
        description = self.train()
        for name, value in changes.items():
            target = description if name in description else description["model"]
            target[name] = value
        (self.folder / "tokenizer.json").write_text(json.dumps(description))

    def configure(self, **fields):
        (self.folder / "tokenizer_config.json").write_text(json.dumps(fields))

    def written(self, tokenizer, vocab_size):
        """Writes a model with the tokenizer, and returns what the file says about it."""
        config = dataclasses.replace(
            presets.tiny(vocab_size=vocab_size), num_layers=1, embed_dim=32
        )
        file = self.folder / "model.gguf"
        write_gguf(
            file,
            published.RandomSource(config),
            tokenizer,
            weight_type=GgufType.BF16,
            identity="random",
        )
        fields = gguf.GGUFReader(file).fields
        prefix = "tokenizer."
        return {
            name.removeprefix(prefix).removeprefix("ggml."): field.contents()
            for name, field in fields.items()
            if name.startswith(prefix)
        }


class KimiTest(FolderTest):
    """A tokenizer in Kimi's form, whose ranks are those of a trained one."""

    def setUp(self):
        super().setUp()
        vocab = self.train()["model"]["vocab"]
        (self.folder / "tokenizer.json").unlink()
        byte_of = byte_of_letter()
        ranks = {bytes(byte_of[letter] for letter in token): i for token, i in vocab.items()}
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items()]
        (self.folder / "tiktoken.model").write_text("".join(lines))
        names = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>"]
        listed = {str(NUM_ORDINARY + i): {"content": name} for i, name in enumerate(names)}
        listed |= {str(NUM_ORDINARY + 255): {"content": "[PAD]"}}
        self.configure(added_tokens_decoder=listed, chat_template="{{ messages }}")

    def test_merges_encode_as_tiktoken_does(self):
        tokenizer = read_gguf_tokenizer(self.folder)
        ordinary = {t: i for i, t in tokenizer.tokens.items() if i < NUM_ORDINARY}
        merges = [tuple(pair.split(" ")) for pair in tokenizer.merges]
        library = Tokenizer(models.BPE(ordinary, merges))
        # Words as tiktoken cuts them, which is tested elsewhere.
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ours = load_kimi(str(self.folder))
        for word in ("banana", " return", "naïve", "漢字", "aaaaaaa", " selfish", "don"):
            self.assertEqual(library.encode(word).ids, ours.encode(word), word)
        self.assertLen(merges, NUM_ORDINARY - 256)

    def test_file_has_roles_types_and_template(self):
        fields = self.written(read_gguf_tokenizer(self.folder), NUM_ORDINARY + 260)
        tokens, types = fields.pop("tokens"), fields.pop("token_type")
        self.assertLen(fields.pop("merges"), NUM_ORDINARY - 256)
        self.assertEqual(
            fields,
            {
                "model": "gpt2",
                "pre": "kimi-k2",
                "bos_token_id": NUM_ORDINARY,
                "eos_token_id": NUM_ORDINARY + 1,
                "eot_token_id": NUM_ORDINARY + 2,
                "padding_token_id": NUM_ORDINARY + 255,
                "add_bos_token": False,
                "chat_template": "{{ messages }}",
            },
        )
        self.assertEqual(types, [NORMAL] * NUM_ORDINARY + [CONTROL] * 256 + [UNUSED] * 4)
        self.assertEqual(tokens[NUM_ORDINARY + 2], "<|im_end|>")
        self.assertEqual(tokens[-1], f"[PAD{NUM_ORDINARY + 259}]")

    def test_template_in_a_file_of_its_own_counts_first(self):
        (self.folder / "chat_template.jinja").write_text("{{ bos_token }}")
        self.assertEqual(read_gguf_tokenizer(self.folder).chat_template, "{{ bos_token }}")

    def test_tokenizer_of_a_larger_model_is_refused(self):
        with self.assertRaisesRegex(ConfigError, f"{NUM_ORDINARY + 256} ids and the model 300"):
            self.written(read_gguf_tokenizer(self.folder), 300)

    def test_two_ids_of_one_name_are_refused(self):
        tokenizer = read_gguf_tokenizer(self.folder)
        tokens = {**tokenizer.tokens, 300: "[BOS]"}
        with self.assertRaisesRegex(DataError, r"\[BOS\] stands for several"):
            self.written(dataclasses.replace(tokenizer, tokens=tokens), NUM_ORDINARY + 256)

    def test_token_that_no_merging_reaches_has_no_halves(self):
        ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"bc": 4}
        self.assertIsNone(halves(ranks, b"a"))
        self.assertIsNone(halves(ranks, b"abc"))
        self.assertEqual(halves(ranks, b"bc"), (b"b", b"c"))


class JsonTest(FolderTest):
    def test_trained_tokenizer_keeps_ids_merges_and_roles(self):
        description = self.train()
        tokenizer = read_gguf_tokenizer(self.folder / "tokenizer.json")
        roles = FileTokenizer(str(self.folder / "tokenizer.json"))
        fields = self.written(tokenizer, roles.vocab_size)
        vocab = description["model"]["vocab"]
        self.assertEqual(fields["tokens"][:NUM_ORDINARY], sorted(vocab, key=vocab.__getitem__))
        self.assertEqual(fields["tokens"][NUM_ORDINARY:], ["<|bos|>", "<|eos|>", "<|pad|>"])
        self.assertEqual(fields["merges"], [" ".join(p) for p in description["model"]["merges"]])
        self.assertEqual(fields["token_type"], [NORMAL] * NUM_ORDINARY + [CONTROL] * 3)
        self.assertEqual(fields["pre"], "gpt-2")
        self.assertTrue(fields["add_bos_token"])
        self.assertEqual(
            (fields["bos_token_id"], fields["eos_token_id"], fields["padding_token_id"]),
            (roles.bos_id, roles.eos_id, roles.pad_id),
        )

    def test_added_tokens_that_are_not_special_are_always_read_as_such(self):
        description = self.train()
        added = description["added_tokens"]
        added += [{**added[0], "id": NUM_ORDINARY + 3, "content": "<think>", "special": False}]
        self.write_json(added_tokens=added)
        fields = self.written(read_gguf_tokenizer(self.folder), NUM_ORDINARY + 5)
        self.assertEqual(fields["token_type"][NUM_ORDINARY + 3 :], [USER_DEFINED, UNUSED])

    def test_config_decides_whether_a_prompt_begins_with_bos(self):
        self.train()
        self.configure(add_bos_token=False)
        self.assertFalse(read_gguf_tokenizer(self.folder).add_bos)

    def test_one_special_token_in_all_roles_does_not_begin_a_prompt(self):
        self.train()
        self.configure(bos_token="<|eos|>", eos_token="<|eos|>")
        self.assertFalse(read_gguf_tokenizer(self.folder).add_bos)

    @parameterized.named_parameters(
        (
            "llama",
            "llama-bpe",
            [
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?"
                r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ],
        ),
        (
            "deepseek",
            "deepseek-v3",
            [
                r"\p{N}{1,3}",
                "[一-龥぀-ゟ゠-ヿ]+",
                "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
                "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
            ],
        ),
    )
    def test_known_word_patterns_have_a_name(self, name, patterns):
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
        described = json.loads(library.to_str())["pre_tokenizer"]
        self.write_json(
            pre_tokenizer=described,
            ignore_merges=name == "llama-bpe",
            normalizer={"type": "Sequence", "normalizers": []},
        )
        self.assertEqual(read_gguf_tokenizer(self.folder).pre, name)

    @parameterized.named_parameters(
        ("normaliser", {"normalizer": {"type": "NFC"}}, "normalises text"),
        ("merges", {"ignore_merges": True}, "its ignore_merges is not that of gpt-2"),
        ("words", {"pre_tokenizer": {"type": "Whitespace"}}, "a pattern of its own"),
        ("nothing", {"pre_tokenizer": None}, "a pattern of its own"),
        (
            "space",
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "a pattern of its own",
        ),
    )
    def test_tokenizer_that_llama_cpp_does_not_have_is_refused(self, changes, message):
        self.write_json(**changes)
        with self.assertRaisesRegex(DataError, message):
            read_gguf_tokenizer(self.folder)

    def test_model_other_than_bpe_is_refused(self):
        library = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
        library.save(str(self.folder / "tokenizer.json"))
        with self.assertRaisesRegex(DataError, "WordLevel, not BPE"):
            read_gguf_tokenizer(self.folder)

    def test_folder_without_a_tokenizer_is_reported(self):
        with self.assertRaisesRegex(DataError, "neither a tiktoken.model nor a tokenizer.json"):
            read_gguf_tokenizer(self.folder)

    @parameterized.parameters("[]", "{")
    def test_malformed_config_is_named(self, text):
        self.train()
        (self.folder / "tokenizer_config.json").write_text(text)
        with self.assertRaisesRegex(DataError, "tokenizer_config.json"):
            read_gguf_tokenizer(self.folder)


if __name__ == "__main__":
    absltest.main()
