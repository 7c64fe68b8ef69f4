"""A GGUF file while it is written: stopped, continued, refused, on a full disk."""

import pathlib
import resource
import tempfile

import gguf
import numpy as np
from absl.testing import absltest

from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop.gguf import plan_gguf, write_gguf
from kimi_jax.interop.gguf_encode import GgufType
from tests.interop.gguf_test import CONFIG
from tests.support import published


class PartialFileTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = self.folder / "model.gguf"

    def test_file_has_its_name_only_when_it_is_complete(self):
        source, seen = published.RandomSource(CONFIG), set()
        write_gguf(
            self.file,
            source,
            None,
            weight_type=GgufType.F32,
            identity="random",
            progress=lambda _: seen.add(tuple(sorted(path.name for path in self.folder.iterdir()))),
        )
        self.assertEqual(seen, {("model.gguf.partial", "model.gguf.partial.json")})
        self.assertEqual([path.name for path in self.folder.iterdir()], ["model.gguf"])

    def test_a_stopped_export_goes_on_after_its_last_whole_tensor(self):
        whole, source = self.folder / "whole.gguf", published.RandomSource(CONFIG)
        write_gguf(whole, source, None, weight_type=GgufType.F16, identity="random")
        norm = source.tensors.pop("model.norm.weight")
        with self.assertRaises(KeyError):
            write_gguf(self.file, source, None, weight_type=GgufType.F16, identity="random")
        self.assertFalse(self.file.exists())
        source.tensors["model.norm.weight"] = norm
        read = []
        rows = source.rows
        source.rows = lambda name, part: (read.append(name), rows(name, part))[1]
        counts = []
        write_gguf(
            self.file,
            source,
            None,
            weight_type=GgufType.F16,
            identity="random",
            progress=counts.append,
        )
        self.assertEqual(set(read), {"model.norm.weight", "lm_head.weight"})
        self.assertEqual(
            counts[-1], sum(entry.num_bytes for entry in plan_gguf(CONFIG, GgufType.F16))
        )
        names = [path.name for path in self.folder.iterdir()]
        self.assertCountEqual(names, ["model.gguf", "whole.gguf"])
        self._assert_same_tensors(whole, self.file)

    def test_a_stopped_export_of_another_source_is_refused_and_left_alone(self):
        source = published.RandomSource(CONFIG)
        source.tensors.pop("model.norm.weight")
        with self.assertRaises(KeyError):
            write_gguf(self.file, source, None, weight_type=GgufType.F16, identity="one")
        partial = self.file.with_name("model.gguf.partial")
        before = partial.read_bytes()
        with self.assertRaisesRegex(ConfigError, "model.gguf.partial holds another, unfinished"):
            write_gguf(
                self.file,
                published.RandomSource(CONFIG),
                None,
                weight_type=GgufType.F16,
                identity="other",
            )
        self.assertEqual(partial.read_bytes(), before)

    def _assert_same_tensors(self, left, right):
        pairs = zip(gguf.GGUFReader(left).tensors, gguf.GGUFReader(right).tensors, strict=True)
        for one, other in pairs:
            self.assertEqual(one.name, other.name)
            np.testing.assert_array_equal(one.data, other.data)

    def test_full_disk_is_reported_with_file_and_tensor(self):
        source = published.RandomSource(CONFIG)
        total = sum(entry.num_bytes for entry in plan_gguf(CONFIG, GgufType.F32))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (total // 2, limits[1]))
            with self.assertRaisesRegex(
                CheckpointFileError,
                r"tensor blk\.1\.\w+\.weight cannot be written to .*model\.gguf\.partial",
            ):
                write_gguf(self.file, source, None, weight_type=GgufType.F32, identity="random")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        self.assertFalse(self.file.exists())

    def test_a_partial_file_that_no_export_left_there_is_refused(self):
        partial = self.file.with_name("model.gguf.partial")
        partial.write_bytes(b"precious")
        with self.assertRaisesRegex(ConfigError, "model.gguf.partial holds another, unfinished"):
            write_gguf(
                self.file,
                published.RandomSource(CONFIG),
                None,
                weight_type=GgufType.BF16,
                identity="random",
            )
        self.assertEqual(partial.read_bytes(), b"precious")

    def test_existing_file_is_not_overwritten(self):
        self.file.write_text("precious")
        with self.assertRaisesRegex(ConfigError, "exists"):
            write_gguf(
                self.file,
                published.RandomSource(CONFIG),
                None,
                weight_type=GgufType.F32,
                identity="random",
            )
        self.assertEqual(self.file.read_text(), "precious")

    def test_folder_that_does_not_exist_is_reported(self):
        with self.assertRaisesRegex(CheckpointFileError, "nowhere"):
            write_gguf(
                self.folder / "nowhere" / "model.gguf",
                published.RandomSource(CONFIG),
                None,
                weight_type=GgufType.F32,
                identity="random",
            )


if __name__ == "__main__":
    absltest.main()
