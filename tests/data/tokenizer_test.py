import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import ConfigError
from kimi_jax.data.tokenizer import ByteTokenizer, check_vocabulary

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


class ByteTokenizerTest(parameterized.TestCase):
    @parameterized.parameters(*ODD_TEXTS)
    def test_text_survives_the_round_trip(self, text):
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(text)
        self.assertEqual(ids, list(text.encode()))
        self.assertEqual(tokenizer.decode(ids), text)

    def test_special_ids_stand_for_no_text_and_broken_bytes_for_the_replacement_character(self):
        tokenizer = ByteTokenizer()
        ids = [tokenizer.bos_id, 65, 0xC3, 66, 5000, tokenizer.eos_id, tokenizer.pad_id]
        self.assertEqual(tokenizer.decode(np.array(ids)), "A\ufffdB\ufffd")

    def test_lengths_sum_to_the_bytes_of_the_text(self):
        tokenizer = ByteTokenizer()
        self.assertLen(tokenizer.token_byte_lengths, tokenizer.vocab_size)
        specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
        self.assertEqual(tokenizer.token_byte_lengths[specials].tolist(), [0, 0, 0])
        self.assertEqual(tokenizer.token_byte_lengths.sum(), 256)


class CheckVocabularyTest(absltest.TestCase):
    def test_vocabulary_smaller_than_the_tokenizer_names_both_options(self):
        with self.assertRaises(ConfigError) as caught:
            check_vocabulary(ByteTokenizer(), 256)
        for part in ("model.vocab_size is 256", "data.tokenizer", "259"):
            self.assertIn(part, str(caught.exception))

    def test_vocabulary_of_equal_or_larger_size_is_accepted(self):
        check_vocabulary(ByteTokenizer(), 259)
        check_vocabulary(ByteTokenizer(), 512)


if __name__ == "__main__":
    absltest.main()
