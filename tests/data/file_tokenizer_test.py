import json
import pathlib
import tempfile

from absl.testing import absltest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kimi_jax.core.errors import DataError
from kimi_jax.data.file_tokenizer import FileTokenizer

TEXT = "the quick brown fox naïve 漢字 jumps over the lazy dog " * 20


class FileTokenizerTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = self.folder / "tokenizer.json"

    def write_byte_level(self, specials):
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator([TEXT], trainer)
        library.save(str(self.file))
        return FileTokenizer(str(self.file))

    def test_text_survives_the_round_trip_even_if_it_names_special_tokens(self):
        tokenizer = self.write_byte_level(["<s>", "</s>", "<pad>"])
        for text in (TEXT, "", "odd \x00 👩‍👩‍👧‍👦 \n\t", "a</s>b<s>"):
            ids = tokenizer.encode(text)
            self.assertEqual(tokenizer.decode(ids), text)
            self.assertTrue({0, 1, 2}.isdisjoint(ids))
            self.assertEqual(tokenizer.token_byte_lengths[ids].sum(), len(text.encode()))

    def test_special_ids_have_the_usual_names(self):
        tokenizer = self.write_byte_level(["<s>", "</s>", "<pad>"])
        self.assertEqual((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (0, 1, 2))
        self.assertEqual(tokenizer.token_byte_lengths[:3].tolist(), [0, 0, 0])
        self.assertEqual(tokenizer.decode([0, *tokenizer.encode("fox"), 1, 9999]), "fox\ufffd")

    def test_one_special_token_plays_all_roles(self):
        tokenizer = self.write_byte_level(["<|endoftext|>"])
        self.assertEqual((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (0, 0, 0))

    def test_config_beside_the_file_names_the_special_tokens(self):
        roles = {"bos_token": "<a>", "eos_token": {"content": "<b>"}, "pad_token": None}
        (self.folder / "tokenizer_config.json").write_text(json.dumps(roles))
        tokenizer = self.write_byte_level(["<b>", "<a>", "<pad>", "</s>"])
        self.assertEqual((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), (1, 0, 2))

    def test_tokenizer_without_an_end_is_refused(self):
        with self.assertRaises(DataError) as caught:
            self.write_byte_level([])
        self.assertIn("tokenizer.json has no token that ends a document", str(caught.exception))

    def test_fingerprint_depends_on_the_roles(self):
        first = self.write_byte_level(["<s>", "</s>"])
        config = json.dumps({"eos_token": "<s>"})
        (self.folder / "tokenizer_config.json").write_text(config)
        self.assertNotEqual(FileTokenizer(str(self.file)).fingerprint, first.fingerprint)

    def test_missing_or_malformed_file_names_the_option(self):
        for content in (None, "{", "\ud800"):
            if content is not None:
                self.file.write_bytes(content.encode(errors="surrogatepass"))
            with self.assertRaises(DataError) as caught:
                FileTokenizer(str(self.file))
            self.assertIn("data.tokenizer.path", str(caught.exception))
            self.assertIn("tokenizer.json", str(caught.exception))

    def test_word_pieces_count_their_own_bytes(self):
        vocab = {"[UNK]": 0, "[SEP]": 1, "na": 2, "##ïve": 3, "\u2581x": 4, "<0x0A>": 5}
        library = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        library.add_special_tokens(["[UNK]", "[SEP]"])
        library.save(str(self.file))
        lengths = FileTokenizer(str(self.file)).token_byte_lengths
        self.assertEqual(lengths.tolist(), [0, 0, 2, 4, 2, 1])


if __name__ == "__main__":
    absltest.main()
