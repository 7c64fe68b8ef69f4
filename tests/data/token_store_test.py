import pathlib
import pickle
import tempfile

import numpy as np
from absl.testing import absltest

from kimi_jax.data.documents import Document
from kimi_jax.data.token_store import TokenStore, write_token_store
from kimi_jax.data.tokenizer import ByteTokenizer


def make_documents(count):
    return [Document(f"d{i}", "é" * (i + 1), 2 * (i + 1)) for i in range(count)]


class TokenStoreTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "store"

    def write(self, documents):
        write_token_store(self.folder, iter(documents), ByteTokenizer())
        return TokenStore(self.folder)

    def test_each_document_lies_between_begin_and_end(self):
        store = self.write(make_documents(3))
        tokenizer = ByteTokenizer()
        expected = [
            [tokenizer.bos_id, *document.text.encode(), tokenizer.eos_id]
            for document in make_documents(3)
        ]
        self.assertEqual(store.tokens.tolist(), sum(expected, []))
        self.assertEqual(store.offsets.tolist(), [0, 4, 10, 18])
        self.assertEqual(store.byte_lengths.tolist(), [2, 4, 6])
        self.assertEqual((store.num_documents, store.num_tokens, store.num_bytes), (3, 18, 12))
        self.assertEqual(store.tokens.dtype, np.uint16)
        self.assertIsInstance(store.tokens, np.memmap)

    def test_more_documents_than_are_encoded_at_once_all_arrive(self):
        store = self.write(make_documents(1) * 10_000)
        self.assertEqual(store.num_documents, 10_000)
        np.testing.assert_array_equal(store.tokens, np.tile(store.tokens[:4], 10_000))

    def test_no_documents_make_an_empty_store(self):
        store = self.write([])
        self.assertEqual((store.num_documents, store.num_tokens, store.num_bytes), (0, 0, 0))
        self.assertEqual(store.tokens.shape, (0,))
        self.assertEqual(store.offsets.tolist(), [0])

    def test_pickle_holds_the_name_and_not_the_tokens(self):
        store = self.write(make_documents(200))
        self.assertEqual(store.tokens[0], 256)
        raw = pickle.dumps(store)
        self.assertLess(len(raw), 1000)
        np.testing.assert_array_equal(pickle.loads(raw).tokens, store.tokens)

    def test_content_tells_where_documents_end(self):
        first = self.write([Document("a", "xy", 2), Document("b", "z", 1)]).content
        self.folder = self.folder.with_name("second")
        again = self.write([Document("c", "xy", 2), Document("d", "z", 1)]).content
        self.folder = self.folder.with_name("third")
        other = self.write([Document("a", "xz", 2), Document("b", "z", 1)]).content
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)


if __name__ == "__main__":
    absltest.main()
