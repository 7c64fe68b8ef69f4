"""Held against the safetensors library in both directions, and against damaged folders."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.safetensors_io import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsFolder,
    SafetensorsWriter,
    TensorInfo,
    write_index,
)
from tests.support import safetensors_files as st

_ROOT = pathlib.Path(__file__).parents[2]


class ReadTest(st.FolderTestCase):
    @parameterized.parameters(*st.LIBRARY_DTYPES)
    def test_what_the_library_writes_is_read_bit_for_bit(self, dtype):
        tensors = {"w": (dtype, st.values(dtype, 5, 6)), "v": (dtype, st.values(dtype, 3, seed=1))}
        st.save_with_library(self.folder / SINGLE_FILE, tensors, {"format": "pt"})
        with SafetensorsFolder(self.folder) as folder:
            self.assertEqual(folder.tensors["w"], TensorInfo("w", dtype, (5, 6)))
            for name, (_, array) in tensors.items():
                read = folder.read(name)
                self.assertEqual((read.dtype, read.shape), (DTYPES[dtype], array.shape))
                self.assertEqual(read.tobytes(), array.tobytes())

    @parameterized.parameters(
        (slice(2, 5), None),
        (slice(None, 3), None),
        (slice(4, None), slice(None)),
        (None, slice(1, 3)),
        (slice(1, 2), slice(0, 7)),
        (slice(3, 3), None),
        (slice(1, 6), slice(2, 2)),
    )
    def test_a_part_is_that_part_and_its_bytes_are_counted(self, rows, columns):
        array = st.values("BF16", 6, 7, 2)
        st.save(
            self.folder / SINGLE_FILE, {"x": ("F32", st.values("F32", 9)), "w": ("BF16", array)}
        )
        with SafetensorsFolder(self.folder) as folder:
            part = folder.read("w", rows, columns)
            expected = array[rows or slice(None), columns or slice(None)]
            self.assertEqual(part.shape, expected.shape)
            self.assertEqual(part.tobytes(), expected.tobytes())
            self.assertEqual(folder.bytes_read, expected.nbytes)

    @parameterized.parameters((3000, 100), (6000, 100), (4100, 3), (4097, 1), (5, 2))
    def test_columns_of_narrow_and_of_wide_rows_are_read(self, width, part):
        array = st.values("U8", 700, width)  # wide ones are more than one block
        st.save(self.folder / SINGLE_FILE, {"w": ("U8", array)})
        with SafetensorsFolder(self.folder) as folder:
            for columns in (slice(0, part), slice(1, 1 + part), slice(width - part, width)):
                read = folder.read("w", slice(2, 699), columns)
                np.testing.assert_array_equal(read, array[2:699, columns])

    def test_of_wide_rows_only_the_columns_are_read(self):
        st.save(self.folder / SINGLE_FILE, {"w": ("U8", st.values("U8", 20, 5000))})
        asked, preadv = [], os.preadv

        def count(descriptor, buffers, offset):
            asked.extend(len(buffer) for buffer in buffers)
            return preadv(descriptor, buffers, offset)

        with (
            mock.patch.object(os, "preadv", count),
            SafetensorsFolder(self.folder) as folder,
        ):
            folder.read("w", columns=slice(10, 60))
        self.assertEqual(sum(asked), 20 * 50)

    def test_the_order_of_the_header_need_not_be_that_of_the_data(self):
        header = {"b": st.entry(8, 16), "a": st.entry(0, 8)}
        data = np.arange(4, dtype=np.float32)
        st.write_raw(self.folder / SINGLE_FILE, header, data.tobytes())
        with SafetensorsFolder(self.folder) as folder:
            self.assertEqual(list(folder.tensors), ["a", "b"])
            np.testing.assert_array_equal(folder.read("b"), data[2:])

    def test_scalars_and_empty_tensors_are_read(self):
        tensors = {
            "scalar": ("F32", np.array(3.0, np.float32)),
            "empty": ("F32", np.zeros((0, 4), np.float32)),
            "last": ("F32", np.arange(3, dtype=np.float32)),
        }
        st.save(self.folder / SINGLE_FILE, tensors)
        with SafetensorsFolder(self.folder) as folder:
            for name, (_, array) in tensors.items():
                np.testing.assert_array_equal(folder.read(name), array, strict=True)

    def test_parts_outside_the_tensor_are_refused(self):
        st.save(self.folder / SINGLE_FILE, {"w": ("F32", st.values("F32", 4, 6))})
        with SafetensorsFolder(self.folder) as folder:
            parts = [(slice(3, 5), None), (slice(-1, 2), None), (slice(3, 2), None)]
            parts += [(slice(0, 4, 2), None), (None, slice(0, 7)), (None, slice(6, 9))]
            for part in parts:
                with self.assertRaisesRegex(CheckpointFileError, r"tensor w has no .* \[4, 6\]"):
                    folder.read("w", *part)

    def test_threads_read_at_the_same_time(self):
        array = st.values("F32", 64, 33)
        st.save(self.folder / SINGLE_FILE, {"w": ("F32", array)})
        blocks = [slice(i, i + 4) for i in range(0, 64, 4)] * 20
        with SafetensorsFolder(self.folder) as folder:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                read = list(pool.map(lambda rows: folder.read("w", rows), blocks))
            self.assertEqual(folder.bytes_read, 20 * array.nbytes)
        for rows, block in zip(blocks, read, strict=True):
            self.assertEqual(block.tobytes(), array[rows].tobytes())

    def test_a_folder_of_several_files_is_read_by_its_index(self):
        files = st.make_sharded(self.folder)
        st.save(self.folder / "other.safetensors", {"c": ("F32", st.values("F32", 1))})
        with SafetensorsFolder(self.folder) as folder:
            self.assertEqual(list(folder.tensors), ["a", "b", "c"])
            self.assertEqual({name: folder.file_of(name) for name in files}, files)
            self.assertEqual(folder.read("c").tobytes(), st.values("I32", 3, 2).tobytes())

    def test_a_single_file_of_any_name_needs_no_index(self):
        st.save(self.folder / "weights.safetensors", {"w": ("F32", st.values("F32", 4))})
        with SafetensorsFolder(self.folder) as folder:
            self.assertEqual(folder.file_of("w"), "weights.safetensors")

    def test_a_file_that_shrinks_while_it_is_open_is_named(self):
        st.save(self.folder / SINGLE_FILE, {"w": ("F32", st.values("F32", 4, 6))})
        with SafetensorsFolder(self.folder) as folder:
            os.truncate(self.folder / SINGLE_FILE, (self.folder / SINGLE_FILE).stat().st_size - 1)
            folder.read("w", slice(0, 3))
            with self.assertRaisesRegex(CheckpointFileError, f"{SINGLE_FILE}: tensor w .*shorter"):
                folder.read("w")

    def test_opening_a_tenth_of_the_tensors_of_kimi_k2_takes_no_time(self):
        entries = {f"experts.{i}.weight": st.entry(8 * i, 8 * i + 8) for i in range(230)}
        files = {}
        for shard in range(61):
            file = f"model-{shard:05}-of-00061.safetensors"
            header = {f"{shard}.{name}": entry for name, entry in entries.items()}
            st.write_raw(self.folder / file, header, bytes(8 * 230))
            files |= dict.fromkeys(header, file)
        write_index(self.folder, files, total_bytes=0)
        start = time.monotonic()
        with SafetensorsFolder(self.folder) as folder:
            self.assertLen(folder.tensors, 61 * 230)
        self.assertLess(time.monotonic() - start, 10)  # 0.2 s measured, 0.8 s with type checks


class WriteTest(st.FolderTestCase):
    def test_the_library_reads_what_is_written_by_rows(self):
        tensors = {dtype: (dtype, st.values(dtype, 6, 4)) for dtype in st.LIBRARY_DTYPES}
        infos = [TensorInfo(name, name, (6, 4)) for name in tensors]
        path = self.folder / SINGLE_FILE
        with SafetensorsWriter(path, infos, {"format": "pt"}) as writer:
            for name, (_, array) in tensors.items():
                for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
                    writer.write(name, array[rows])
        expected = {name: (name, (6, 4), array.tobytes()) for name, (_, array) in tensors.items()}
        self.assertEqual(st.load_with_library(path), expected)
        self.assertEqual([file.name for file in self.folder.iterdir()], [SINGLE_FILE])

    def test_the_file_is_byte_for_byte_that_of_the_library(self):
        tensors = {
            "wide": ("F32", st.values("F32", 3, 5)),
            "größe": ("BF16", st.values("BF16", 7)),
            "narrow": ("F8_E4M3", st.values("F8_E4M3", 2, 3)),
        }
        st.save_with_library(self.folder / "library.safetensors", tensors, {"format": "pt"})
        st.save(self.folder / "ours.safetensors", tensors, {"format": "pt"})
        expected = (self.folder / "library.safetensors").read_bytes()
        self.assertEqual((self.folder / "ours.safetensors").read_bytes(), expected)

    def test_rows_that_are_not_contiguous_are_written_in_order(self):
        array = st.values("BF16", 4, 6)
        st.save(self.folder / SINGLE_FILE, {"w": ("BF16", array.T)})
        with SafetensorsFolder(self.folder) as folder:
            self.assertEqual(folder.read("w").tobytes(), array.T.tobytes())

    @parameterized.named_parameters(
        ("another_dtype", [("a", np.zeros((2, 3), np.float64))], "tensor a .*F32.*float64"),
        ("other_columns", [("a", np.zeros((2, 4), np.float32))], r"tensor a .*\[2, 4\]"),
        ("other_rank", [("a", np.zeros(3, np.float32))], r"tensor a .*\[3\]"),
        ("too_many_rows", [("a", np.zeros((3, 3), np.float32))], "tensor a .*up to 2 rows"),
        ("the_wrong_order", [("b", np.zeros(2, np.float32))], "tensor b .*not due.* a"),
        ("too_few_rows", [("a", np.zeros((1, 3), np.float32))], "tensor a .*only 1"),
        ("too_few_tensors", [("a", np.zeros((2, 3), np.float32))], "tensor b .*not complete"),
    )
    def test_a_file_is_not_made_of(self, writes, message):
        infos = [TensorInfo("a", "F32", (2, 3)), TensorInfo("b", "F32", (2,))]
        with (
            self.assertRaisesRegex(CheckpointFileError, f"{SINGLE_FILE}: {message}"),
            SafetensorsWriter(self.folder / SINGLE_FILE, infos, {}) as writer,
        ):
            for name, array in writes:
                writer.write(name, array)
        self.assertEmpty(list(self.folder.iterdir()))

    def test_a_file_is_not_made_when_the_program_fails(self):
        infos = [TensorInfo("a", "F32", (2,))]
        with (
            self.assertRaisesRegex(KeyError, "elsewhere"),
            SafetensorsWriter(self.folder / SINGLE_FILE, infos, {}) as writer,
        ):
            writer.write("a", np.zeros(2, np.float32))
            raise KeyError("elsewhere")
        self.assertEmpty(list(self.folder.iterdir()))

    def test_until_it_is_complete_the_file_has_another_name(self):
        infos = [TensorInfo("a", "F32", (2,))]
        with SafetensorsWriter(self.folder / SINGLE_FILE, infos, {}) as writer:
            writer.write("a", np.zeros(2, np.float32))
            self.assertFalse((self.folder / SINGLE_FILE).exists())
        self.assertTrue((self.folder / SINGLE_FILE).exists())

    def test_a_file_that_exists_is_kept(self):
        path = self.folder / SINGLE_FILE
        path.write_text("mine")
        with (
            self.assertRaisesRegex(CheckpointFileError, f"{SINGLE_FILE}: exists"),
            SafetensorsWriter(path, [TensorInfo("a", "F32", (2,))], {}),
        ):
            pass
        self.assertEqual(path.read_text(), "mine")

    @parameterized.named_parameters(
        ("a_name_twice", [TensorInfo("a", "F32", (2,))] * 2, "tensor a .*twice"),
        ("an_unknown_dtype", [TensorInfo("a", "Q4", (2,))], "tensor a .*'Q4'"),
    )
    def test_a_plan_is_refused_with(self, infos, message):
        with self.assertRaisesRegex(CheckpointFileError, message):
            SafetensorsWriter(self.folder / SINGLE_FILE, infos, {})

    def test_a_folder_that_is_absent_is_named(self):
        path = self.folder / "absent" / SINGLE_FILE
        with (
            self.assertRaisesRegex(
                CheckpointFileError, f"{SINGLE_FILE}: cannot be written: No such"
            ),
            SafetensorsWriter(path, [], {}),
        ):
            pass


# The kernel itself refuses to let a file of this process grow beyond the limit.
_FILL_THE_DISK = """
import pathlib, resource, sys
import numpy as np
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop import safetensors_io as io
folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
infos = [io.TensorInfo(name, "F32", (64, 256)) for name in ("first", "second")]
try:
    with io.SafetensorsWriter(folder / io.SINGLE_FILE, infos, {}) as writer:
        for name in ("first", "second"):
            for _ in range(2):
                writer.write(name, np.ones((32, 256), np.float32))
    io.write_index(folder, {f"{i}": io.SINGLE_FILE for i in range(9000)}, 0)
except CheckpointFileError as error:
    print(error)
"""


class FullDiskTest(st.FolderTestCase):
    @parameterized.parameters(
        (100, ": cannot be written"),  # already in the header
        (80_000, ": tensor second cannot be written"),
        (150_000, f"{INDEX_FILE}: cannot be written"),
    )
    def test_a_full_disk_is_reported_and_nothing_half_written_stays(self, limit, message):
        result = subprocess.run(
            [sys.executable, "-c", _FILL_THE_DISK, self.folder, str(limit)],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertIn(message, result.stdout)
        self.assertIn("File too large", result.stdout)
        complete = [SINGLE_FILE] if INDEX_FILE in message else []
        self.assertEqual([path.name for path in self.folder.iterdir()], complete)

    def test_a_file_with_a_hole_is_not_made_by_who_goes_on_when_there_is_space_again(self):
        program = """
import contextlib, pathlib, resource, sys
import numpy as np
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.safetensors_io import SafetensorsWriter, TensorInfo
path, rows = pathlib.Path(sys.argv[1]), np.ones((4, 1000), np.float32)
unlimited = resource.RLIM_INFINITY
try:
    with SafetensorsWriter(path, [TensorInfo("w", "F32", (8, 1000))], {}) as writer:
        writer.write("w", rows)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited))
        with contextlib.suppress(CheckpointFileError):
            writer.write("w", rows)  # a part of it is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        writer.write("w", rows)
except CheckpointFileError as error:
    print(error)
"""
        command = [sys.executable, "-c", program, self.folder / SINGLE_FILE]
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
        self.assertIn(f"{SINGLE_FILE}: tensor w cannot be written", result.stdout)
        self.assertEmpty(list(self.folder.iterdir()))


if __name__ == "__main__":
    absltest.main()
