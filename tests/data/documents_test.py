from absl.testing import absltest

from kimi_jax.data.documents import Document, pages


class PagesTest(absltest.TestCase):
    def test_pages_are_the_document_in_order_and_have_names_of_their_own(self):
        text = "naïve text" * 3
        found = list(pages(Document("a", text, len(text.encode())), 8))
        self.assertEqual("".join(page.text for page in found), text)
        self.assertEqual([len(page.text) for page in found], [8, 8, 8, 6])
        self.assertEqual([page.name for page in found], ["a#0", "a#1", "a#2", "a#3"])

    def test_sizes_are_bytes_while_pages_are_of_characters(self):
        (page,) = pages(Document("a", "ïïï", 6), 3)
        self.assertEqual(page.num_bytes, 6)


if __name__ == "__main__":
    absltest.main()
