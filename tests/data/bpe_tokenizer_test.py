import itertools
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import DataError
from kimi_jax.data import bpe_tokenizer

ODD_TEXTS = (
    "",
    "plain text",
    "\x00\x1f\x7f\n\r\n\t  trailing  ",
    "naïve café \u0301\u200d",
    "漢字と仮名 한국어 עברית العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈\U0010ffff\ue000",
    "<|bos|><|eos|>[BOS]<|im_end|>",
    "don't WE'LL 1234567 x=  12.5e-3\n\n\n    return",
)


def make_texts():
    words = ["def", "return", "self", "naïve", "x", "12345", "  ", "\n    ", "don't", "漢字"]
    return [" ".join(order) for order in itertools.permutations(words, 3)]


class BpeTokenizerTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.file = folder / "tokenizer.json"
        bpe_tokenizer.train_bpe(make_texts(), 300, cls.file)
        cls.tokenizer = bpe_tokenizer.load_bpe(cls.file)

    @parameterized.parameters(*ODD_TEXTS)
    def test_text_survives_the_round_trip(self, text):
        ids = self.tokenizer.encode(text)
        self.assertEqual(self.tokenizer.decode(ids), text)
        self.assertEqual(self.tokenizer.token_byte_lengths[ids].sum(), len(text.encode()))
        self.assertTrue(all(i < 297 for i in ids), "a special id in the middle of a text")

    def test_ids_are_those_of_the_library_that_trained_it(self):
        from tokenizers import Tokenizer

        library = Tokenizer.from_file(str(self.file))
        library.encode_special_tokens = True
        texts = [*ODD_TEXTS, *make_texts(), pathlib.Path(__file__).read_text()]
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            self.assertEqual(ids.tolist(), library.encode(text).ids)
        self.assertEqual(self.tokenizer.vocab_size, library.get_vocab_size())
        self.assertEqual(self.tokenizer.eos_id, library.token_to_id("<|eos|>"))

    def test_vocabulary_has_the_size_that_was_asked_for(self):
        self.assertEqual(self.tokenizer.vocab_size, 300)
        tokenizer = self.tokenizer
        self.assertEqual([tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id], [297, 298, 299])
        self.assertEqual(tokenizer.token_byte_lengths[297:].tolist(), [0, 0, 0])

    def test_training_again_gives_the_same_tokenizer(self):
        again = self.file.with_name("again.json")
        bpe_tokenizer.train_bpe(make_texts(), 300, again)
        self.assertEqual(again.read_text(), self.file.read_text())
        self.assertEqual(bpe_tokenizer.load_bpe(again).fingerprint, self.tokenizer.fingerprint)

    def test_other_training_text_gives_another_fingerprint(self):
        other = self.file.with_name("other.json")
        bpe_tokenizer.train_bpe([text + "zebra" for text in make_texts()], 300, other)
        self.assertNotEqual(bpe_tokenizer.load_bpe(other).fingerprint, self.tokenizer.fingerprint)

    def test_corpus_too_small_for_the_vocabulary_names_the_option_and_the_limit(self):
        with self.assertRaises(DataError) as caught:
            bpe_tokenizer.train_bpe(["abc abc"], 5000, self.file.with_name("small.json"))
        self.assertIn("data.tokenizer.vocab_size 5000", str(caught.exception))
        self.assertIn("at most 262", str(caught.exception))

    def test_unknown_ids_become_the_replacement_character(self):
        ids = np.array([self.tokenizer.bos_id, *self.tokenizer.encode("ab"), 10_000])
        self.assertEqual(self.tokenizer.decode(ids), "ab\ufffd")


class SplitLongTest(parameterized.TestCase):
    @parameterized.parameters(
        ("ab " * 400_000, 3),  # more than 400,000 characters
        ("x" * 60_000, 3),  # a run of more than 25,000
        (" " * 25_001 + "x", 2),
        ("short", 1),
        ("", 0),
    )
    def test_pieces_are_short_and_make_up_the_text(self, text, num_pieces):
        pieces = bpe_tokenizer.split_long(text)
        self.assertLen(pieces, num_pieces)
        self.assertEqual("".join(pieces), text)

    def test_long_texts_are_encoded_in_pieces_and_survive_the_round_trip(self):
        ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
        specials = {"b": 257, "e": 258, "p": 259}
        tokenizer = bpe_tokenizer.BpeTokenizer(
            ranks, bpe_tokenizer.WORD_PATTERN, specials, ("b", "e", "p")
        )
        text = "x" + "ab" * 20_000  # the first piece ends between an a and a b
        ids = tokenizer.encode(text)
        self.assertEqual(ids, [120, *[256] * 12_499, 97, 98, *[256] * 7_500])
        self.assertEqual(tokenizer.decode(ids), text)


if __name__ == "__main__":
    absltest.main()
