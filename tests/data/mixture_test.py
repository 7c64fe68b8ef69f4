import pathlib
import pickle
import tempfile

import chex
import numpy as np
from absl.testing import absltest

from kimi_jax.data.documents import Document
from kimi_jax.data.mixture import RowSource, mix_rows
from kimi_jax.data.token_store import TokenStore, write_token_store
from kimi_jax.data.tokenizer import ByteTokenizer


class MixtureTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def make_source(self, letter, *, seed=0, name=None):
        lengths = np.random.default_rng(ord(letter)).integers(1, 60, 40)
        documents = [Document(f"{i}", letter * int(n), int(n)) for i, n in enumerate(lengths)]
        folder = self.folder / letter
        if not folder.exists():
            write_token_store(folder, documents, ByteTokenizer())
        return RowSource(TokenStore(folder), length=16, pad_id=258, seed=seed, name=name or letter)

    def epoch(self, source, number):
        size = source.rows_per_epoch
        return [source[i] for i in range(number * size, (number + 1) * size)]

    def test_every_epoch_trains_on_every_token_once_in_another_order(self):
        source = self.make_source("a")
        store = TokenStore(self.folder / "a")
        epochs = [self.epoch(source, number) for number in range(3)]
        for rows in epochs:
            self.assertEqual(sum(row["weights"].sum() for row in rows), store.num_tokens - 40)
            inputs = np.concatenate([row["inputs"][row["segments"] > 0] for row in rows])
            # Every token is an input but the last one of the epoch, the end of a document.
            np.testing.assert_array_equal(np.sort([*inputs, 257]), np.sort(store.tokens))
        segments = [[row["segments"].tobytes() for row in rows] for rows in epochs]
        self.assertNotEqual(segments[0], segments[1])
        # Not the same rows in another order, either: documents have other neighbours.
        self.assertNotEqual(set(segments[0]), set(segments[1]))
        self.assertNotEqual(set(segments[1]), set(segments[2]))

    def test_row_is_a_pure_function_of_seed_name_and_number(self):
        numbers = [70, 3, 500, 3, 0]
        source = self.make_source("a")
        rows = [source[i] for i in numbers]
        chex.assert_trees_all_equal(rows, [self.make_source("a")[i] for i in numbers])
        chex.assert_trees_all_equal(rows, [pickle.loads(pickle.dumps(source))[i] for i in numbers])
        for other in (self.make_source("a", seed=1), self.make_source("a", name="b")):
            different = [other[i]["segments"] for i in range(20)]
            self.assertFalse(np.array_equal(different, [source[i]["segments"] for i in range(20)]))

    def test_sources_appear_in_proportion_to_their_weights(self):
        sources = {letter: self.make_source(letter) for letter in "abc"}
        rows = mix_rows(sources, {"a": 1.0, "b": 2.0, "c": 5.0})
        letters = [chr(np.min(rows[i]["inputs"])) for i in range(800)]
        self.assertEqual([letters.count(letter) for letter in "abc"], [100, 200, 500])
        # Evenly, too: every stretch of eight rows has the same proportions.
        for start in range(0, 800, 8):
            self.assertEqual(sorted(letters[start : start + 8]), list("abbccccc"))

    def test_mixture_takes_the_rows_of_each_source_in_order(self):
        sources = {letter: self.make_source(letter) for letter in "ab"}
        mixed = mix_rows(sources, {"a": 1.0, "b": 3.0})
        rows = [row for row in map(mixed.__getitem__, range(40)) if row["inputs"].min() == ord("a")]
        chex.assert_trees_all_equal(rows, [sources["a"][i] for i in range(10)])


if __name__ == "__main__":
    absltest.main()
