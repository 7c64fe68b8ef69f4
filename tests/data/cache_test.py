import concurrent.futures
import os
import pathlib
import tempfile
import threading
from unittest import mock

from absl.testing import absltest

from kimi_jax.core.errors import DataError
from kimi_jax.data import cache


class CachedFolderTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.folder = self.root / "tokens" / "key"
        self.fills = 0

    def fill(self, folder):
        self.fills += 1
        (folder / "a").write_text("whole")

    def test_content_is_made_once(self):
        for _ in range(2):
            self.assertEqual(cache.cached_folder(self.folder, self.fill), self.folder)
        self.assertEqual(self.fills, 1)
        self.assertEqual((self.folder / "a").read_text(), "whole")

    def test_failed_fill_leaves_nothing_that_looks_whole(self):
        def fail(folder):
            (folder / "a").write_text("half")
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            cache.cached_folder(self.folder, fail)
        self.assertEqual(list(self.folder.parent.iterdir()), [])
        cache.cached_folder(self.folder, self.fill)
        self.assertEqual((self.folder / "a").read_text(), "whole")

    def test_two_at_once_both_get_a_whole_folder(self):
        both_started = threading.Barrier(2)

        def slow_fill(folder):
            both_started.wait(timeout=10)
            self.fill(folder)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = [pool.submit(cache.cached_folder, self.folder, slow_fill) for _ in range(2)]
            self.assertEqual([r.result(timeout=20) for r in results], [self.folder] * 2)
        self.assertEqual(self.fills, 2)
        self.assertEqual([f.name for f in self.folder.parent.iterdir()], ["key"])

    def test_folder_that_cannot_be_written_names_the_option(self):
        (self.root / "tokens").write_text("a file where a folder should be")
        with self.assertRaises(DataError) as caught:
            cache.cached_folder(self.folder, self.fill)
        self.assertIn("set data.cache_dir", str(caught.exception))
        self.assertIn(str(self.root / "tokens"), str(caught.exception))


class FactsTest(absltest.TestCase):
    def test_fingerprint_depends_on_every_fact(self):
        facts = [["a", 1, 2.0, None], ["a", 1, 2.5, None], ["b", 1, 2.0, None], [["a"], 1]]
        self.assertLen({cache.fingerprint(f) for f in facts}, len(facts))
        self.assertEqual(cache.fingerprint({"a": 1, "b": 2}), cache.fingerprint({"b": 2, "a": 1}))

    def test_file_that_changed_has_other_facts(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "a"
            file.write_text("one")
            before = cache.file_facts([file])
            self.assertEqual(cache.file_facts([file]), before)
            file.write_text("two")
            os.utime(file, ns=(0, 1))
            self.assertNotEqual(cache.file_facts([file]), before)

    def test_root_is_the_users_cache_unless_given(self):
        self.assertEqual(cache.cache_root("/a/b"), pathlib.Path("/a/b"))
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": "/x"}):
            self.assertEqual(cache.cache_root(None), pathlib.Path("/x/kimi_jax"))


if __name__ == "__main__":
    absltest.main()
