import gzip
import hashlib
import random

import numpy as np
from absl.testing import absltest

from kimi_jax.data import held_out
from kimi_jax.data.documents import Document


class IsHeldOutTest(absltest.TestCase):
    def test_share_of_documents_is_near_the_fraction_and_grows_with_it(self):
        names = [f"document {i}" for i in range(20_000)]
        small = {name for name in names if held_out.is_held_out(name, 0.02)}
        large = {name for name in names if held_out.is_held_out(name, 0.1)}
        self.assertAlmostEqual(len(small) / len(names), 0.02, delta=0.004)
        self.assertAlmostEqual(len(large) / len(names), 0.1, delta=0.01)
        self.assertLess(small, large)
        self.assertFalse(any(held_out.is_held_out(name, 0.0) for name in names))

    def test_choice_stays_the_same_for_ever(self):
        digest = hashlib.blake2b(b"a.py", digest_size=8, key=b"held out").digest()
        expected = int.from_bytes(digest, "big") / 2**64
        self.assertTrue(held_out.is_held_out("a.py", expected + 1e-9))
        self.assertFalse(held_out.is_held_out("a.py", expected - 1e-9))


class HashSampleTest(absltest.TestCase):
    def test_sample_is_the_longest_prefix_in_hash_order_whatever_the_order_of_offers(self):
        rng = np.random.default_rng(0)
        documents = [
            Document(f"d{i}", "x" * n, int(n)) for i, n in enumerate(rng.integers(1, 90, 60))
        ]
        ranked = sorted(documents, key=lambda d: held_out.hash_fraction(d.name, b"salt"))
        expected, total = [], 0
        for document in ranked:
            total += document.num_bytes
            if total > 400:
                break
            expected.append(document)
        for seed in range(20):
            random.Random(seed).shuffle(documents)
            sample = held_out.HashSample(400, b"salt")
            for document in documents:
                sample.offer(document)
            self.assertEqual(sample.documents(), expected)

    def test_first_document_is_kept_even_if_it_is_too_long(self):
        sample = held_out.HashSample(10, b"salt")
        sample.offer(Document("long", "x" * 99, 99))
        self.assertLen(sample.documents(), 1)


class BaselineTest(absltest.TestCase):
    def test_entropy_of_equally_frequent_bytes_is_the_logarithm_of_their_number(self):
        self.assertAlmostEqual(held_out.unigram_bits_per_byte(bytes(range(64)) * 3), 6.0)
        self.assertEqual(held_out.unigram_bits_per_byte(b"aaaa"), 0.0)

    def test_gzip_counts_the_bits_of_the_program(self):
        text = b"some text, some more text, and some text again. " * 50
        expected = 8 * len(gzip.compress(text, compresslevel=9)) / len(text)
        self.assertAlmostEqual(held_out.gzip_bits_per_byte(text), expected)


if __name__ == "__main__":
    absltest.main()
