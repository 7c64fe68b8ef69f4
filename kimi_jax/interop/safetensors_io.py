"""Reads and writes safetensors files by blocks of rows, and says which file and tensor is bad.

A folder of several files has an index that says which file holds which tensor. Neither reading nor
writing needs memory for more than one block of rows.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import threading
import types
from collections.abc import Mapping, Sequence

import numpy as np

from kimi_jax.interop.safetensors_header import (
    DTYPES,
    Slot,
    TensorInfo,
    encode_header,
    fail,
    parse_json,
    read_header,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PAGE_BYTES = 4096
_BLOCK_BYTES = 1 << 20  # read at once where parts of rows are taken
_SHARD = re.compile(r"-of-0*([0-9]+)\.safetensors$")


class SafetensorsFolder:
    """A folder of safetensors files, opened for reading; a context manager.

    Opening reads the index and every header, and checks all of it against the sizes of the files:
    what is missing, truncated or contradictory is found before the first value is read. Only files
    that the index names are opened. Reading is safe from several threads.

    Attributes:
      path: the folder.
      tensors: what it holds, by name, in the order of the files and of the data in them.
      bytes_read: bytes of values that `read` has returned.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Opens a folder with an index, or with a single file.

        Args:
          path: the folder.

        Raises:
          CheckpointFileError: a file is missing or damaged, or index and files contradict each
            other.
        """
        self.path = pathlib.Path(path)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._slots: dict[str, Slot] = {}
        self._descriptors: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            index = _read_index(self.path)
            files = sorted(set(index.values())) if index else [_single_file(self.path)]
            for file in files:
                self._open(file, stack)
            for file in files:
                self._add_tensors(file, index)
            _check_all_found(self.path, index, self._slots)
            self._stack = stack.pop_all()
        infos = {name: slot.info for name, slot in self._slots.items()}
        self.tensors: Mapping[str, TensorInfo] = types.MappingProxyType(infos)

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        self._descriptors.clear()
        self._stack.close()

    def file_of(self, name: str) -> str:
        """Returns the name of the file that holds a tensor.

        Raises:
          CheckpointFileError: there is no such tensor.
        """
        return self._slot(name).file

    def read(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> np.ndarray:
        """Reads a part of a tensor, and no more of the disk.

        Args:
          name: of the tensor.
          rows: which of its first dimension, with a step of 1; None for all.
          columns: which of its second dimension; None for all.

        Returns:
          The values in the dtype of the file, in memory of their own.

        Raises:
          CheckpointFileError: there is no such tensor or part, or the file cannot be read.
        """
        slot = self._slot(name)
        shape, row_bytes, column_bytes = _row_layout(slot.info)
        row, end_row = self._bounds(slot, "rows", 0, rows)
        column, end_column = self._bounds(slot, "columns", 1, columns)
        num_rows = end_row - row
        buffer = np.empty((num_rows, (end_column - column) * column_bytes), np.uint8)
        offset = slot.offset + row * row_bytes + column * column_bytes
        self._fill_rows(slot, buffer, offset, row_bytes)
        with self._lock:
            self.bytes_read += buffer.size
        part = (num_rows, end_column - column, *shape[2:])
        values = buffer.reshape(-1).view(DTYPES[slot.info.dtype])
        return values.reshape(part[: len(slot.info.shape)])

    def _open(self, file: str, stack: contextlib.ExitStack) -> None:
        try:
            descriptor = os.open(self.path / file, os.O_RDONLY)
        except OSError as error:
            fail(self.path / file, None, f"cannot be opened: {error.strerror}", error)
        stack.callback(os.close, descriptor)
        self._descriptors[file] = descriptor

    def _add_tensors(self, file: str, index: dict[str, str]) -> None:
        path = self.path / file
        for slot in read_header(path, self._descriptors[file]):
            name = slot.info.name
            if index and index.get(name) != file:
                where = f"says that it is in {index[name]}" if name in index else "does not list it"
                fail(path, name, f"is in this file, but {INDEX_FILE} {where}")
            self._slots[name] = slot

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            fail(self.path, name, "is not in this folder")
        return self._slots[name]

    def _bounds(self, slot: Slot, what: str, axis: int, part: slice | None) -> tuple[int, int]:
        """First and end of a part of an axis; those of a missing axis are 0 and 1."""
        shape = slot.info.shape
        if part is None:
            return 0, shape[axis] if axis < len(shape) else 1
        start = 0 if part.start is None else part.start
        stop = part.stop
        if stop is None and axis < len(shape):
            stop = shape[axis]
        fits = axis < len(shape) and part.step in (None, 1) and 0 <= start <= stop <= shape[axis]
        if not fits:
            given = f"{part.start}:{part.stop}" + (f":{part.step}" if part.step else "")
            message = f"has no {what} {given}: its shape is {list(shape)}"
            fail(self.path / slot.file, slot.info.name, message)
        return start, stop

    def _fill_rows(self, slot: Slot, buffer: np.ndarray, offset: int, row_bytes: int) -> None:
        """Reads the same part of consecutive rows into `buffer` [rows, bytes of the part].

        A disk is read by pages: where less than one lies between two parts, reading what is between
        them reads nothing more, and is ten times faster than a call for each row.
        """
        num_rows, part_bytes = buffer.shape
        gap = row_bytes - part_bytes
        if gap == 0:
            self._fill(slot, memoryview(buffer.reshape(-1)), offset)
            return
        block = max(1, _BLOCK_BYTES // row_bytes) if gap < _PAGE_BYTES else 1
        for first in range(0, num_rows, block):
            rows = np.empty((min(block, num_rows - first), row_bytes), np.uint8)
            needed = memoryview(rows.reshape(-1))[: rows.size - gap]
            self._fill(slot, needed, offset + first * row_bytes)
            buffer[first : first + len(rows)] = rows[:, :part_bytes]

    def _fill(self, slot: Slot, view: memoryview, offset: int) -> None:
        """Reads until `view` is full: one call may return less, as it does beyond 2 GiB."""
        path, name = self.path / slot.file, slot.info.name
        while view:
            try:
                count = os.preadv(self._descriptors[slot.file], [view], offset)
            except OSError as error:
                fail(path, name, f"cannot be read: {error.strerror}", error)
            if count == 0:
                fail(path, name, f"the file has become shorter: it ends at byte {offset}")
            view, offset = view[count:], offset + count


class SafetensorsWriter:
    """Writes one safetensors file, tensor after tensor; a context manager.

    The file appears under its name when it is complete and on the disk, and never otherwise. Until
    then its name ends in `.partial`.
    """

    def __init__(
        self, path: str | os.PathLike, tensors: Sequence[TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        """Plans the file.

        Args:
          path: of the file, which must not exist.
          tensors: what will be written, in this order.
          metadata: free text of the header; transformers wants `{"format": "pt"}`.

        Raises:
          CheckpointFileError: two tensors have one name, or a dtype is unknown.
        """
        self.path = pathlib.Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._header = encode_header(self.path, tensors, metadata)
        self._tensors = tuple(tensors)
        self._position = 0  # of the tensor that is being written
        self._rows_done = 0  # of it
        self._descriptor = -1

    def __enter__(self) -> "SafetensorsWriter":
        if self.path.exists():
            fail(self.path, None, "exists already; remove it, or name another")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            self._descriptor = os.open(self._partial, flags, 0o666)
        except OSError as error:
            fail(self.path, None, f"cannot be written: {error.strerror}", error)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._remove)
            self._append(memoryview(self._header), None)
            on_error.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._remove)
            if error is not None:
                return
            if self._position < len(self._tensors):
                missing = self._tensors[self._position]
                done = f"only {self._rows_done} of its rows were written"
                fail(self.path, missing.name, f"is not complete: {done}")
            self._publish()
            on_error.pop_all()

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends the next rows of a tensor.

        Args:
          name: of the tensor that is incomplete, or of the next one of the plan.
          array: [rows, ...] in the dtype of the plan; a scalar is written whole.

        Raises:
          CheckpointFileError: the array does not fit the plan, or the disk is full.
        """
        if self._position == len(self._tensors):
            fail(self.path, name, "is more than was planned: all tensors are written")
        info = self._tensors[self._position]
        if name != info.name:
            fail(self.path, name, f"is not due: the next rows are those of {info.name}")
        rows = self._check(info, array)
        values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._append(memoryview(values), name)
        self._rows_done += rows
        if self._rows_done == _num_rows(info):
            self._position, self._rows_done = self._position + 1, 0

    def _check(self, info: TensorInfo, array: np.ndarray) -> int:
        """Returns the number of rows, if they fit."""
        if array.dtype != DTYPES[info.dtype]:
            fail(self.path, info.name, f"is planned as {info.dtype}, but given as {array.dtype}")
        rows, left = _num_rows(array), _num_rows(info) - self._rows_done
        same_rows = array.ndim == len(info.shape) and array.shape[1:] == info.shape[1:]
        if not same_rows or rows > left:
            wanted = f"up to {left} rows of {list(info.shape)} are left"
            fail(self.path, info.name, f"{wanted}, but {list(array.shape)} was given")
        return rows

    def _append(self, view: memoryview, name: str | None) -> None:
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                self._remove()  # what follows could not be in its place
                fail(self.path, name, f"cannot be written: {error.strerror}", error)

    def _publish(self) -> None:
        try:
            os.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            os.replace(self._partial, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            fail(self.path, None, f"cannot be written: {error.strerror}", error)

    def _remove(self) -> None:
        """Leaves nothing of the file behind."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def write_index(folder: str | os.PathLike, files: Mapping[str, str], total_bytes: int) -> None:
    """Writes the index of a folder; last, because a folder without it is not complete.

    Args:
      folder: of the files.
      files: name of the file that holds each tensor.
      total_bytes: of the values of all tensors.

    Raises:
      CheckpointFileError: the disk is full.
    """
    path = pathlib.Path(folder) / INDEX_FILE
    partial = path.with_name(path.name + ".partial")
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        fail(path, None, f"cannot be written: {error.strerror}", error)


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """File of each tensor; empty where the folder has no index."""
    path = folder / INDEX_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        fail(path, None, f"cannot be read: {error.strerror}", error)
    index = parse_json(path, text)
    files = index.get("weight_map") if isinstance(index, dict) else None
    is_map = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not is_map or not files:
        fail(path, None, "has no weight_map, which names the file of each tensor")
    for file, name in {file: name for name, file in files.items()}.items():
        if pathlib.PurePath(file).name != file:
            fail(path, name, f"is listed in {file!r}, which is no name of a file in this folder")
        if not (folder / file).is_file():
            fail(folder / file, name, f"the file is missing, but {INDEX_FILE} lists it")
    return files


def _single_file(folder: pathlib.Path) -> str:
    """The only safetensors file of a folder without an index."""
    if not folder.is_dir():
        fail(folder, None, "is no folder")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_FILE in files:
        return SINGLE_FILE
    if not files:
        fail(folder, None, "holds no *.safetensors file")
    shards = _SHARD.search(files[0])
    if len(files) > 1 or (shards and int(shards[1]) > 1):
        fail(folder / INDEX_FILE, None, f"is missing: it lists the tensors of {files[0]} ...")
    return files[0]


def _check_all_found(
    folder: pathlib.Path, index: dict[str, str], slots: Mapping[str, Slot]
) -> None:
    for name, file in index.items():
        if name not in slots:
            fail(folder / file, name, f"is not in this file, but {INDEX_FILE} lists it there")


def _row_layout(info: TensorInfo) -> tuple[tuple[int, ...], int, int]:
    """Shape of at least two dimensions, bytes of a row, and bytes of one column of a row."""
    shape = info.shape + (1,) * (2 - len(info.shape))
    column_bytes = math.prod(shape[2:]) * DTYPES[info.dtype].itemsize
    return shape, shape[1] * column_bytes, column_bytes


def _num_rows(array: TensorInfo | np.ndarray) -> int:
    return array.shape[0] if array.shape else 1


def _sync_folder(folder: pathlib.Path) -> None:
    """Makes a new name of a file as lasting as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
