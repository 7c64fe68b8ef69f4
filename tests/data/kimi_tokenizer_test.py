import base64
import json
import pathlib
import tempfile
import unittest

from absl.testing import absltest, parameterized

from kimi_jax.core.errors import DataError
from kimi_jax.data.kimi_tokenizer import load_kimi

# The published files, where somebody put them beside the repository.
PUBLISHED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "kimi_k2"


@unittest.skipUnless((PUBLISHED / "tiktoken.model").is_file(), "needs the published tokenizer")
class PublishedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokenizer = load_kimi(str(PUBLISHED))

    def pieces(self, text):
        return [self.tokenizer.decode([i]) for i in self.tokenizer.encode(text)]

    def test_sizes_and_special_ids_are_those_of_the_published_model(self):
        tokenizer = self.tokenizer
        self.assertEqual(tokenizer.vocab_size, 163840)
        self.assertEqual(
            (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (163584, 163585, 163839)
        )
        for name, i in (
            ("<|im_end|>", 163586),
            ("<|im_user|>", 163587),
            ("<|im_assistant|>", 163588),
            ("<|im_system|>", 163594),
            ("<|tool_calls_section_begin|>", 163595),
            ("<|tool_call_end|>", 163599),
            ("<|im_middle|>", 163601),
            ("<think>", 163606),
            ("[UNK]", 163838),
            ("<|reserved_token_163589|>", 163589),
        ):
            self.assertEqual(tokenizer.specials[name], i)
        self.assertLen(tokenizer.specials, 256)
        self.assertEqual((tokenizer.token_byte_lengths == 0).sum(), 256)

    @parameterized.parameters(
        "Hello, world! don't WE'LL",
        "\x00\x1f\x7f\n\r\n\t  trailing  ",
        "漢字と仮名 한국어 עברית العربية café\u0301",
        "👩‍👩‍👧‍👦🏳️‍🌈\U0010ffff\ue000",
        "<|im_end|>[BOS]<think>",
        "x" * 30_000,
    )
    def test_text_survives_the_round_trip(self, text):
        ids = self.tokenizer.encode(text)
        self.assertEqual(self.tokenizer.decode(ids), text)
        self.assertLess(max(ids), 163584)
        self.assertEqual(self.tokenizer.token_byte_lengths[ids].sum(), len(text.encode()))

    def test_chinese_characters_never_share_a_token_with_others(self):
        for piece in self.pieces("机器学习machine learning深度学习ABC 你好，世界"):
            han = {"\u4e00" <= letter <= "\u9fff" for letter in piece}
            self.assertLen(han, 1, piece)
        self.assertEqual(self.pieces("你好hello")[-1], "hello")

    def test_numbers_are_cut_after_every_three_digits(self):
        self.assertEqual(self.pieces("1234567"), ["123", "456", "7"])
        self.assertEqual(self.pieces("x=31415")[-2:], ["314", "15"])

    def test_words_are_cut_where_the_case_changes(self):
        self.assertEqual("".join(self.pieces("camelCase")[:1]), "camel")
        self.assertEqual(self.pieces("camelCase")[1], "Case")


class MalformedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.write_model([bytes([i]) for i in range(256)])
        self.write_specials({256: "[BOS]", 257: "[EOS]", 511: "[PAD]"})

    def write_model(self, tokens):
        lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)]
        (self.folder / "tiktoken.model").write_text("".join(lines))

    def write_specials(self, specials):
        listed = {str(i): {"content": name} for i, name in specials.items()}
        config = json.dumps({"added_tokens_decoder": listed})
        (self.folder / "tokenizer_config.json").write_text(config)

    def error(self):
        with self.assertRaises(DataError) as caught:
            load_kimi(str(self.folder))
        return str(caught.exception)

    def test_small_model_of_the_same_form_is_read_by_file_or_folder(self):
        for path in (self.folder, self.folder / "tiktoken.model"):
            tokenizer = load_kimi(str(path))
            self.assertEqual(tokenizer.vocab_size, 512)
            self.assertEqual(
                (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (256, 257, 511)
            )

    def test_no_token_reaches_from_other_letters_into_chinese_ones(self):
        you = "\u4f60".encode()
        mixed = [b"A" + you, b"a" + you, you + b"a", you + b"A"]
        self.write_model([*(bytes([i]) for i in range(256)), you[:2], you, *mixed])
        self.write_specials({262: "[BOS]", 263: "[EOS]", 264: "[PAD]"})
        tokenizer = load_kimi(str(self.folder))
        self.assertEqual(tokenizer.encode("A\u4f60a\u4f60A"), [65, 257, 97, 257, 65])

    def test_missing_file_names_the_option(self):
        (self.folder / "tokenizer_config.json").unlink()
        message = self.error()
        self.assertIn("data.tokenizer.path: cannot read", message)
        self.assertIn("tokenizer_config.json", message)

    def test_malformed_line_is_named_with_its_number(self):
        with (self.folder / "tiktoken.model").open("a") as file:
            file.write("###\n")
        self.assertIn("tiktoken.model line 257", self.error())

    def test_ranks_with_a_gap_are_refused(self):
        (self.folder / "tiktoken.model").write_text("QQ== 0\nQg== 2\n")
        self.assertIn("must have the ranks 0, 1, 2, ...", self.error())

    def test_special_token_outside_the_reserved_ids_is_refused(self):
        self.write_specials({3: "[BOS]", 257: "[EOS]", 511: "[PAD]"})
        self.assertIn("special tokens at [3]", self.error())

    def test_missing_special_token_is_named(self):
        self.write_specials({256: "[BOS]", 257: "[EOS]"})
        self.assertIn("lacks the special tokens [PAD]", self.error())

    def test_config_without_special_tokens_is_refused(self):
        (self.folder / "tokenizer_config.json").write_text("{}")
        self.assertIn("added_tokens_decoder", self.error())


if __name__ == "__main__":
    absltest.main()
