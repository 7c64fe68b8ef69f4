import dataclasses
import os
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from kimi_jax.configs.data import (
    DataConfig,
    SourceConfig,
    SourceKind,
    TokenizerConfig,
    TokenizerKind,
)
from kimi_jax.core.errors import DataError
from kimi_jax.data import cache
from kimi_jax.data import corpus as corpus_lib
from kimi_jax.data.corpus import open_corpus
from kimi_jax.data.held_out import is_held_out
from kimi_jax.data.sources import read_documents


def texts_of(corpus, store):
    """Returns the documents of a token store as text."""
    bounds = store.offsets.tolist()
    return [
        corpus.tokenizer.decode(store.tokens[a:b])
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


class CorpusTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.folder = self.root / "texts"
        self.folder.mkdir()
        for i in range(60):
            (self.folder / f"{i:02}.txt").write_text(f"document {i} says naïve things " * 9)

    def make_config(self, **options):
        source = SourceConfig(kind=SourceKind.TEXT, path=str(self.folder))
        defaults = {
            "sources": {"mine": source},
            "sequence_length": 32,
            "held_out_fraction": 0.2,
            "cache_dir": str(self.root / "cache"),
        }
        return DataConfig(**{**defaults, **options})

    def test_every_document_is_trained_on_or_held_out_by_its_text(self):
        config = self.make_config()
        corpus = open_corpus(config)
        documents = list(read_documents(config.sources["mine"], "data.sources.mine"))
        held_out = {d.text for d in documents if is_held_out(d.text, 0.2)}
        source = corpus.sources["mine"]
        self.assertEqual(set(texts_of(corpus, source.held_out)), held_out)
        self.assertEqual(
            texts_of(corpus, source.train), [d.text for d in documents if d.text not in held_out]
        )
        self.assertBetween(len(held_out), 5, 20)

    def test_held_out_text_beyond_the_limit_is_neither_measured_nor_trained_on(self):
        everything = open_corpus(self.make_config()).sources["mine"]
        limited = open_corpus(self.make_config(held_out_max_bytes=900)).sources["mine"]
        self.assertLessEqual(limited.held_out.num_bytes, 900)
        self.assertLess(limited.held_out.num_bytes, everything.held_out.num_bytes)
        self.assertEqual(limited.train.content, everything.train.content)

    def open_limited(self, limit):
        """Returns the source trained on whole and with a limit, and the texts of both."""
        whole, limited = (
            open_corpus(self.make_config(train_max_bytes=most)) for most in (None, limit)
        )
        sources = whole.sources["mine"], limited.sources["mine"]
        return *sources, *(texts_of(whole, source.train) for source in sources)

    def test_limited_training_text_is_pages_of_many_training_documents(self):
        for i in range(20):  # each of them longer than the limit
            lines = "".join(f"line {line} of the long document {i}\n" for line in range(1500))
            (self.folder / f"long {i}.txt").write_text(lines)
        _, limited, documents, pages = self.open_limited(20_000)
        self.assertBetween(limited.train.num_bytes, 20_000 - 128, 20_000)
        found = [[n for n, text in enumerate(documents) if page in text] for page in pages]
        self.assertTrue(all(found))
        self.assertGreater(len({n for numbers in found for n in numbers}), 15)
        *_, more = self.open_limited(40_000)
        self.assertContainsSubset(pages, more)

    def test_limit_of_training_text_leaves_the_held_out_text_alone(self):
        whole, limited, *_ = self.open_limited(1000)
        self.assertLess(limited.train.num_bytes, 1000)
        self.assertEqual(limited.held_out.content, whole.held_out.content)

    def test_limit_below_a_page_of_training_text_takes_one(self):
        *_, documents, pages = self.open_limited(1)
        self.assertLen(pages, 1)
        self.assertTrue(any(pages[0] in text for text in documents))

    def test_limit_beyond_the_training_text_takes_all(self):
        whole, limited, documents, pages = self.open_limited(1 << 20)
        self.assertEqual(limited.train.num_bytes, whole.train.num_bytes)
        cut = [text[i : i + 4 * 32] for text in documents for i in range(0, len(text), 4 * 32)]
        self.assertCountEqual(pages, cut)

    def test_limit_of_training_text_adds_to_the_name_in_the_cache_and_changes_no_other(self):
        facts = []

        def spy(given):
            facts.append(given)
            return cache.fingerprint(given)

        with mock.patch.object(corpus_lib, "fingerprint", spy):
            self.open_limited(1000)
        without, limited = facts
        self.assertLen(without, 6)  # as before there was a limit
        self.assertEqual(limited[:6], without)
        self.assertEqual(limited[6:], ["train_max_bytes", 1000, 4 * 32])

    def test_held_out_text_is_that_of_the_held_out_tokens(self):
        corpus = open_corpus(self.make_config())
        source = corpus.sources["mine"]
        text = source.held_out_text.read_bytes()
        self.assertEqual(text.decode(), "".join(texts_of(corpus, source.held_out)))
        self.assertLen(text, source.held_out.num_bytes)

    def test_second_opening_reads_the_cache_alone(self):
        for tokenizer in (
            TokenizerConfig(),
            TokenizerConfig(kind=TokenizerKind.BPE, vocab_size=270),
        ):
            config = self.make_config(tokenizer=tokenizer)
            first = open_corpus(config).statistics()
            with mock.patch.object(corpus_lib, "read_documents", side_effect=AssertionError):
                self.assertEqual(open_corpus(config).statistics(), first)

    def test_changed_file_is_tokenised_anew(self):
        config = self.make_config()
        before = open_corpus(config).sources["mine"]
        changed = {f: f.read_text().replace("says", "told") for f in self.folder.iterdir()}
        file = next(
            file
            for file, text in sorted(changed.items())
            if not is_held_out(file.read_text(), 0.2) and not is_held_out(text, 0.2)
        )
        file.write_text(changed[file])
        os.utime(file, ns=(0, 1))
        after = open_corpus(config).sources["mine"]
        self.assertNotEqual(after.train.content, before.train.content)
        self.assertEqual(after.held_out.content, before.held_out.content)

    def test_bpe_is_trained_on_training_documents_alone(self):
        config = self.make_config(tokenizer=TokenizerConfig(kind=TokenizerKind.BPE, vocab_size=290))
        seen = []
        train = corpus_lib.train_bpe

        def spy(texts, vocab_size, file):
            seen.extend(texts)
            train(iter(seen), vocab_size, file)

        with mock.patch.object(corpus_lib, "train_bpe", spy):
            corpus = open_corpus(config)
        source = corpus.sources["mine"]
        self.assertCountEqual(seen, texts_of(corpus, source.train))
        self.assertEqual(corpus.tokenizer.vocab_size, 290)
        self.assertLess(source.train.num_tokens, source.train.num_bytes)

    def test_statistics_count_each_source(self):
        statistics = open_corpus(self.make_config()).statistics()
        documents = statistics["mine/train_documents"] + statistics["mine/held_out_documents"]
        self.assertEqual(documents, 60)
        tokens, size = statistics["mine/train_tokens"], statistics["mine/train_bytes"]
        self.assertEqual(tokens, size + 2 * statistics["mine/train_documents"])

    def error(self, **options):
        with self.assertRaises(DataError) as caught:
            open_corpus(self.make_config(**options))
        return str(caught.exception)

    def test_empty_corpus_names_the_source(self):
        for file in self.folder.iterdir():
            file.write_text("")
        self.assertIn("data.sources.mine has no documents to train on", self.error())

    def test_corpus_that_holds_nothing_out_names_the_option(self):
        message = self.error(held_out_fraction=1e-9)
        self.assertIn("data.held_out_fraction 1e-09 holds out none of the corpus's 60", message)
        open_corpus(self.make_config(held_out_fraction=0.0))

    def test_malformed_file_leaves_no_cache_that_looks_whole(self):
        bad = self.folder / "99.txt"
        bad.write_bytes(b"\xff")
        self.assertIn("99.txt is not valid UTF-8", self.error())
        bad.unlink()
        source = open_corpus(self.make_config()).sources["mine"]
        self.assertEqual(source.train.num_documents + source.held_out.num_documents, 60)

    def test_copies_of_a_held_out_document_are_held_out_too(self):
        for file in list(self.folder.iterdir()):
            (self.folder / f"copy of {file.name}").write_text(file.read_text())
        corpus = open_corpus(self.make_config())
        source = corpus.sources["mine"]
        held_out, train = (
            set(texts_of(corpus, store)) for store in (source.held_out, source.train)
        )
        self.assertTrue(held_out.isdisjoint(train))
        self.assertEqual(source.held_out.num_documents, 2 * len(held_out))

    def test_embedded_corpus_needs_nothing_but_python(self):
        config = dataclasses.replace(
            DataConfig(sequence_length=64), cache_dir=str(self.root / "cache")
        )
        corpus = open_corpus(config)
        source = corpus.sources["embedded"]
        self.assertGreater(source.train.num_bytes, 5e6)
        self.assertBetween(source.held_out.num_bytes, 50_000, config.held_out_max_bytes)
        held_out, train = (
            {ids.tobytes() for ids in np.split(store.tokens, store.offsets[1:-1])}
            for store in (source.held_out, source.train)
        )
        self.assertTrue(held_out.isdisjoint(train))


if __name__ == "__main__":
    absltest.main()
