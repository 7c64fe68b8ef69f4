"""The header of a safetensors file: what it holds, and where.

A file is the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its
dtype, shape and place in the data), and the data of all tensors without gaps.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from kimi_jax.core.errors import CheckpointFileError

DTYPES: Mapping[str, np.dtype] = types.MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "I16": np.dtype(np.int16),
        "U16": np.dtype(np.uint16),
        "I32": np.dtype(np.int32),
        "U32": np.dtype(np.uint32),
        "I64": np.dtype(np.int64),
        "U64": np.dtype(np.uint64),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    }
)

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_METADATA = "__metadata__"
_GIT_LFS_POINTER = b"version "  # how the text file begins that git leaves in place of a large one


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype (a key of `DTYPES`) and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies: the name of its file, and its first byte there."""

    info: TensorInfo
    file: str
    offset: int


def read_header(path: pathlib.Path, descriptor: int) -> list[Slot]:
    """Reads and checks the header of an open file.

    Returns:
      Where each tensor lies, in the order of the data.

    Raises:
      CheckpointFileError: the header is damaged, or does not fit the size of the file.
    """
    try:
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, _LENGTH_BYTES, 0)
        length = int.from_bytes(start, "little")
        if length > min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            hint = "; it is a pointer of git lfs" if start == _GIT_LFS_POINTER else ""
            message = f"has {size} bytes, and says that its header has {length}; fetch it again"
            fail(path, None, message + hint)
        header = parse_json(path, os.pread(descriptor, length, _LENGTH_BYTES))
    except OSError as error:
        fail(path, None, f"cannot be read: {error.strerror}", error)
    if not isinstance(header, dict):
        fail(path, None, "has a header that is no JSON object")
    header.pop(_METADATA, None)
    entries = [_parse_entry(path, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[:2])
    return _place(path, entries, data=_LENGTH_BYTES + length, size=size)


def _parse_entry(path: pathlib.Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Begin and end in the data, and what lies there."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            fail(path, name, f"has a bad entry in the header: {entry!r}")
    if dtype not in DTYPES:
        fail(path, name, f"has the unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        fail(path, name, f"has the bad shape {shape!r}")
    info = TensorInfo(name, dtype, tuple(shape))
    if end - begin != info.num_bytes:
        needs = f"{dtype} {shape} needs {info.num_bytes}"
        fail(path, name, f"has {end - begin} bytes (data_offsets {begin} to {end}), but {needs}")
    return begin, end, info


def _place(
    path: pathlib.Path, entries: list[tuple[int, int, TensorInfo]], data: int, size: int
) -> list[Slot]:
    """Checks that tensors fill the data without holes, and adds the start of the data."""
    expected, slots = 0, []
    for begin, end, info in entries:
        if begin != expected:
            what = "overlaps the tensor" if begin < expected else "leaves a hole"
            fail(
                path, info.name, f"{what} before it: begins at {begin} of the data, not {expected}"
            )
        if data + end > size:
            missing = f"the file ends {data + end - size} bytes before its end; fetch it again"
            fail(path, info.name, f"is truncated: {missing}")
        slots.append(Slot(info, path.name, data + begin))
        expected = end
    if data + expected != size:
        fail(path, None, f"has {size - data - expected} bytes after its last tensor")
    return slots


def parse_json(path: pathlib.Path, text: bytes) -> Any:
    """Returns what JSON says.

    Raises:
      CheckpointFileError: it is no JSON, or an object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            fail(path, None, f"its JSON lists {counts.most_common(1)[0][0]} twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        fail(
            path, None, f"is damaged, or no such file: no JSON where it should be ({error})", error
        )


def encode_header(
    path: pathlib.Path, tensors: Sequence[TensorInfo], metadata: Mapping[str, str]
) -> bytes:
    """Returns the first bytes of a file that holds tensors in this order.

    Raises:
      CheckpointFileError: two tensors have one name, or a dtype is unknown.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for info in tensors:
        if info.name in header:
            fail(path, info.name, "is planned twice")
        if info.dtype not in DTYPES:
            fail(path, info.name, f"is planned with the unknown dtype {info.dtype!r}")
        begin, end = end, end + info.num_bytes
        entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
        header[info.name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)  # so that the data is aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def fail(
    path: pathlib.Path, name: str | None, problem: str, cause: Exception | None = None
) -> NoReturn:
    """Raises the error that names the file and, unless None, the tensor."""
    tensor = "" if name is None else f"tensor {name} "
    raise CheckpointFileError(f"{path}: {tensor}{problem}") from cause
