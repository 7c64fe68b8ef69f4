import dataclasses
import json
import pathlib
import tempfile

import chex
import jax
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.data import DataConfig, SourceConfig, SourceKind
from kimi_jax.core.errors import DataError
from kimi_jax.data.corpus import open_corpus
from kimi_jax.data.held_out import gzip_bits_per_byte, unigram_bits_per_byte
from kimi_jax.data.pipeline import held_out_batches, train_batches

BATCH, LENGTH, STEPS = 4, 24, 30


class PipelineTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        root = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        sources = {}
        for name, weight in (("a", 1.0), ("b", 3.0)):
            lines = [json.dumps({"text": f"{name}{i} " * (i % 7 + 1)}) for i in range(80)]
            file = root / f"{name}.jsonl"
            file.write_text("\n".join(lines))
            sources[name] = SourceConfig(kind=SourceKind.JSONL, path=str(file), weight=weight)
        cls.config = DataConfig(
            sources=sources,
            sequence_length=LENGTH,
            held_out_fraction=0.2,
            cache_dir=str(root / "cache"),
            num_threads=0,
        )
        cls.corpus = open_corpus(cls.config)
        batches = train_batches(cls.corpus, cls.config, BATCH)
        cls.expected = [next(batches) for _ in range(STEPS)]

    def start(self, **options):
        config = dataclasses.replace(self.config, **options)
        batches = train_batches(self.corpus, config, BATCH)
        self.addCleanup(batches.close)
        return batches

    def test_batches_have_the_promised_shapes_and_formats(self):
        batch = self.expected[0]
        for name in ("inputs", "targets", "segments", "positions"):
            self.assertEqual(getattr(batch, name).dtype, np.int32)
        self.assertEqual(batch.weights.dtype, np.float32)
        chex.assert_tree_shape_prefix(batch, (BATCH, LENGTH))

    @parameterized.parameters((0, 0), (1, 0), (4, 0), (1, 2))
    def test_batches_do_not_depend_on_threads_or_processes(self, num_threads, num_workers):
        batches = self.start(num_threads=num_threads, num_workers=num_workers)
        for expected in self.expected[:12]:
            chex.assert_trees_all_equal(next(batches), expected)
        # Onward from a saved position, too, with whatever was prepared ahead thrown away.
        batches.set_state({**batches.get_state(), "step": 17})
        for expected in self.expected[17:21]:
            chex.assert_trees_all_equal(next(batches), expected)

    @parameterized.parameters(((0, 1, 2, 3),), ((2, 3),), ((0, 3),), ((1,),))
    def test_a_process_makes_only_its_own_rows_of_the_same_batches(self, part):
        batches = train_batches(self.corpus, self.config, BATCH, part)
        self.addCleanup(batches.close)
        for expected in self.expected:
            rows = jax.tree.map(lambda array: array[list(part)], expected)
            chex.assert_trees_all_equal(next(batches), rows)
        self.start().set_state(batches.get_state())  # a position belongs to all parts

    @parameterized.parameters(0, 1, 13, STEPS - 1)
    def test_saved_position_continues_with_the_next_batch(self, step):
        first = self.start(num_threads=2)
        for _ in range(step):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = self.start()
        second.set_state(state)
        chex.assert_trees_all_equal(next(second), self.expected[step])
        self.assertEqual(second.get_state()["step"], step + 1)

    def test_closed_iterator_goes_on_where_it_was(self):
        batches = self.start(num_threads=1)
        next(batches)
        batches.close()
        chex.assert_trees_all_equal(next(batches), self.expected[1])

    @parameterized.parameters(
        {"seed": 1}, {"sequence_length": LENGTH + 1}, {"sources": None}, {"batch": BATCH + 1}
    )
    def test_position_of_other_batches_is_refused(self, batch=BATCH, **options):
        if "sources" in options:
            halved = dataclasses.replace(self.config.sources["a"], weight=0.5)
            options["sources"] = {**self.config.sources, "a": halved}
        config = dataclasses.replace(self.config, **options)
        other = train_batches(self.corpus, config, batch)
        self.addCleanup(other.close)
        with self.assertRaisesRegex(DataError, "belongs to other batches"):
            other.set_state(self.start().get_state())

    def test_another_seed_gives_other_batches(self):
        batch = next(self.start(seed=1))
        self.assertFalse(np.array_equal(batch.inputs, self.expected[0].inputs))

    def test_held_out_text_never_appears_in_training(self):
        held_out = self.texts([*held_out_batches(self.corpus, self.config, BATCH).batches])
        self.assertNotEmpty(held_out)
        rows = sum(-(-self.corpus.sources[name].train.num_tokens // LENGTH) for name in "ab")
        batches = self.start()
        trained = self.texts([next(batches) for _ in range(rows)])  # several epochs
        self.assertGreater(len(trained), 60)  # most of the documents that fit a row
        self.assertTrue(held_out.isdisjoint(trained))

    def texts(self, batches):
        """Returns every document that lies whole in a row."""
        found = set()
        for batch in batches:
            for ids, segments in zip(batch.inputs, batch.segments, strict=True):
                for segment in range(1, segments.max() + 1):
                    document = ids[segments == segment]
                    if document[0] == 256 and document[-1] == 257:
                        found.add(bytes(document[1:-1].astype(np.uint8)))
        return found

    def test_held_out_batches_predict_every_byte_and_end_once(self):
        held_out = held_out_batches(self.corpus, self.config, BATCH)
        text = b"".join(self.corpus.sources[name].held_out_text.read_bytes() for name in ("a", "b"))
        chex.assert_tree_shape_prefix(held_out.batches, (BATCH, LENGTH))
        predicted = np.concatenate([batch.targets[batch.weights > 0] for batch in held_out.batches])
        self.assertLen(predicted, held_out.num_tokens)
        self.assertEqual(bytes(predicted[predicted < 256].astype(np.uint8)), text)
        self.assertEqual((predicted == 257).sum(), held_out.num_documents)
        self.assertEqual(held_out.num_bytes, len(text))
        self.assertEqual(held_out.unigram_bits_per_byte, unigram_bits_per_byte(text))
        self.assertEqual(held_out.gzip_bits_per_byte, gzip_bits_per_byte(text))

    def test_held_out_padding_has_no_weight(self):
        last = held_out_batches(self.corpus, self.config, 64).batches[-1]
        padded = last.segments == 0
        self.assertTrue(padded.any())
        self.assertFalse(last.weights[padded].any())
        self.assertTrue((last.inputs[padded] == self.corpus.tokenizer.pad_id).all())

    def test_nothing_held_out_names_the_option(self):
        config = dataclasses.replace(self.config, held_out_fraction=0.0)
        with self.assertRaisesRegex(DataError, "data.held_out_fraction"):
            held_out_batches(open_corpus(config), config, BATCH)


if __name__ == "__main__":
    absltest.main()
