"""Small safetensors files, whole and damaged, written by the library and by ourselves."""

import json
import pathlib
import tempfile

import numpy as np
import safetensors
from absl.testing import parameterized

from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop.safetensors_header import DTYPES, TensorInfo
from kimi_jax.interop.safetensors_io import SafetensorsFolder, SafetensorsWriter, write_index

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# As the library names them when it is given raw bytes.
LIBRARY_DTYPES = {
    "BOOL": "bool",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def values(dtype, *shape, seed=0):
    """Every bit pattern may occur, NaN and infinities too."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    if dtype == "BOOL":
        raw %= 2
    return raw.view(DTYPES[dtype]).reshape(shape)


def save_with_library(path, tensors, metadata=None):
    """`tensors`: name -> (safetensors dtype, array)."""
    specs = {
        name: safetensors.TensorSpec(
            dtype=LIBRARY_DTYPES[dtype],
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, (dtype, array) in tensors.items()
    }
    safetensors.serialize_file(specs, path, metadata=metadata)


def load_with_library(path):
    found = safetensors.deserialize(path.read_bytes())
    return {name: (x["dtype"], tuple(x["shape"]), bytes(x["data"])) for name, x in found}


def save(path, tensors, metadata=None):
    infos = [TensorInfo(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with SafetensorsWriter(path, infos, metadata or {}) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)


def write_raw(path, header, data=b""):
    """A file whose header says anything; a string is taken as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def make_sharded(folder):
    """Two files and a true index; returns the index's map."""
    save(folder / FIRST, {"a": ("F32", values("F32", 4, 6)), "b": ("BF16", values("BF16", 8))})
    save(folder / SECOND, {"c": ("I32", values("I32", 3, 2))})
    files = {"a": FIRST, "b": FIRST, "c": SECOND}
    write_index(folder, files, total_bytes=4 * 24 + 2 * 8 + 4 * 6)
    return files


class FolderTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def assert_refused(self, *words):
        with self.assertRaises(CheckpointFileError) as raised, SafetensorsFolder(self.folder):
            pass
        for word in words:
            self.assertIn(word, str(raised.exception))
