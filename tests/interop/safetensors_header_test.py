"""Damaged files and folders are named, and the dtypes are those of the formats."""

import os

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.interop.safetensors_io import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    write_index,
)
from tests.support import safetensors_files as st


class DamagedFolderTest(st.FolderTestCase):
    def test_a_missing_shard_is_named_with_a_tensor_of_it(self):
        st.make_sharded(self.folder)
        (self.folder / st.SECOND).unlink()
        self.assert_refused(st.SECOND, "tensor c", "missing")

    def test_several_files_without_an_index_are_refused(self):
        st.make_sharded(self.folder)
        (self.folder / INDEX_FILE).unlink()
        self.assert_refused(INDEX_FILE, "is missing")
        (self.folder / st.SECOND).unlink()  # one of two files is not a single file
        self.assert_refused(INDEX_FILE, "is missing")

    def test_a_folder_without_files_and_no_folder_are_refused(self):
        self.assert_refused(str(self.folder), "no *.safetensors")
        self.folder /= "absent"
        self.assert_refused("absent", "no folder")

    @parameterized.parameters(
        "{", '{"metadata": {}}', '{"weight_map": []}', "[]", b"\xff".decode("latin1")
    )
    def test_an_index_that_is_none_is_refused(self, text):
        st.make_sharded(self.folder)
        (self.folder / INDEX_FILE).write_text(text, encoding="latin1")
        self.assert_refused(INDEX_FILE)

    def test_an_index_that_lists_a_tensor_twice_is_refused(self):
        st.make_sharded(self.folder)
        text = f'{{"weight_map": {{"a": "{st.FIRST}", "b": "{st.FIRST}", "a": "{st.SECOND}"}}}}'
        (self.folder / INDEX_FILE).write_text(text)
        self.assert_refused(INDEX_FILE, "lists a twice")

    @parameterized.named_parameters(
        ("a_tensor_that_is_not_there", {"d": st.FIRST}, (st.FIRST, "tensor d", "not in this file")),
        ("another_file_for_a_tensor", {"b": st.SECOND}, (st.FIRST, "tensor b", f"in {st.SECOND}")),
        ("too_few_tensors", {"b": None}, (st.FIRST, "tensor b", "does not list it")),
        (
            "a_file_outside",
            {"b": "../x.safetensors"},
            (INDEX_FILE, "tensor b", "'../x.safetensors', which is no name"),
        ),
    )
    def test_an_index_that_lists(self, change, words):
        files = st.make_sharded(self.folder) | change
        files = {name: file for name, file in files.items() if file}
        write_index(self.folder, files, total_bytes=0)
        self.assert_refused(*words)

    def test_a_tensor_in_two_files_is_refused(self):
        files = st.make_sharded(self.folder)
        st.save(
            self.folder / "third.safetensors",
            {"c": ("F32", st.values("F32", 2))} | {"d": ("F32", st.values("F32", 2))},
        )
        write_index(self.folder, files | {"d": "third.safetensors"}, total_bytes=0)
        self.assert_refused("third.safetensors", "tensor c", st.SECOND)

    @parameterized.named_parameters(
        ("overlap", {"a": st.entry(0, 8), "b": st.entry(4, 12)}, 12, ("tensor b", "overlaps")),
        ("hole", {"a": st.entry(0, 8), "b": st.entry(12, 20)}, 20, ("tensor b", "hole")),
        ("late_start", {"a": st.entry(4, 12)}, 12, ("tensor a", "hole")),
        ("wrong_shape", {"a": st.entry(0, 8, shape=(3,))}, 8, ("tensor a", "needs 12")),
        ("wrong_dtype", {"a": st.entry(0, 8, dtype="BF16")}, 8, ("tensor a", "needs 4")),
        ("unknown_dtype", {"a": st.entry(0, 8, dtype="Q4")}, 8, ("tensor a", "'Q4'")),
        ("negative_shape", {"a": st.entry(0, 8, shape=(-1, -2))}, 8, ("tensor a", "shape")),
        ("no_offsets", {"a": {"dtype": "F32", "shape": [2]}}, 8, ("tensor a", "bad entry")),
        ("truncated", {"a": st.entry(0, 8), "b": st.entry(8, 16)}, 13, ("tensor b", "truncated")),
        ("too_long", {"a": st.entry(0, 8)}, 9, ("1 bytes after",)),
        ("no_json", "{", 0, ("JSON",)),
        ("a_list", "[]", 0, ("JSON object",)),
        ("same_name", '{"a": 1, "b": 2, "a": 3}', 8, ("lists a twice",)),
    )
    def test_a_file_is_refused_for(self, header, size, words):
        st.write_raw(self.folder / SINGLE_FILE, header, bytes(size))
        self.assert_refused(SINGLE_FILE, *words)

    @parameterized.named_parameters(
        ("empty", b""),
        ("short", b"\x01\x00"),
        ("header_beyond_the_end", (3).to_bytes(8, "little") + b"{}"),
        ("absurd_header", (10**12).to_bytes(8, "little") + b"{}"),
        ("git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\n"),
    )
    def test_a_file_is_refused_that_is(self, content):
        (self.folder / SINGLE_FILE).write_bytes(content)
        self.assert_refused(SINGLE_FILE, f"has {len(content)} bytes")

    def test_a_header_of_more_than_100_megabytes_is_not_read(self):
        with open(self.folder / SINGLE_FILE, "wb") as file:
            file.write((100_000_001).to_bytes(8, "little"))
            file.truncate(100_000_100)  # sparse
        self.assert_refused(SINGLE_FILE, "100000001")

    def test_what_is_refused_leaves_no_file_open(self):
        st.make_sharded(self.folder)
        (self.folder / st.SECOND).write_bytes(b"")
        before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        self.assert_refused(st.SECOND)
        after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        self.assertEqual(after, before)


class DtypesTest(absltest.TestCase):
    def test_one_is_one_in_the_bits_of_the_formats(self):
        ones = {"BF16": 0x3F80, "F8_E4M3": 0x38, "F8_E5M2": 0x3C, "F8_E8M0": 0x7F}
        for name, bits in ones.items():
            dtype = DTYPES[name]
            value = np.array(bits, f"u{dtype.itemsize}").view(dtype)
            self.assertEqual(float(value), 1.0, name)
        self.assertEqual(DTYPES["F8_E4M3"], np.dtype(ml_dtypes.float8_e4m3fn))


if __name__ == "__main__":
    absltest.main()
