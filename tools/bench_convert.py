"""Measures conversions of a synthetic checkpoint: speed beside the disk's, and peak memory.

    python tools/bench_convert.py --gb=8 --folder=/a/disk/with/40/GB

Makes a checkpoint of random bfloat16 weights with K2's widths, and converts it, each time in a
process of its own, whose peak memory the operating system counts. Reading begins with files that
are not in memory, and writing ends when all is on the disk. The disk itself is measured in the same
run, with files as large. A conversion's rate is that of the larger of what it reads and writes.

The target is 60 % of the slower of the disk's two rates, and at most twice the largest tensor and
1 GiB of memory.
"""

import dataclasses
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zlib

import ml_dtypes
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import program
from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face
from kimi_jax.core.errors import require
from kimi_jax.core.param_spec import count_parameters
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.model import transformer

_SIZE_GB = flags.DEFINE_float("gb", 8.0, "size of the bfloat16 checkpoint")
_FOLDER = flags.DEFINE_string("folder", "runs/bench_convert", "where to write, and clean up")
_GB = 1e9
_GIB = 1 << 30
_BLOCK = 16 << 20
_VOCAB_SIZE = 16_384  # small, so that experts are most of it
_INPUTS = ("fp8", "int4")  # results that are converted further
_CONVERSIONS = (
    ("bf16", "bf16"),
    ("bf16", "fp8"),
    ("fp8", "bf16"),
    ("bf16", "int4"),
    ("int4", "bf16"),
    ("int4", "gguf_q4_0"),
    ("bf16", "gguf_q8_0"),
    ("bf16", "gguf_bf16"),
)


class RandomSource:
    """A `TensorSource` of random bfloat16 values: a block of noise, shifted for each row."""

    group_size = None

    def __init__(self, config):
        """Draws the noise."""
        self.config = config
        self._tensors = hf_tensors(config)
        noise = np.random.default_rng(0).normal(scale=0.02, size=1 << 22)
        self._noise = noise.astype(ml_dtypes.bfloat16)

    def rows(self, name, rows):
        """Returns random values that depend on the name."""
        shape = (rows.stop - rows.start, *self._tensors[name].shape[1:])
        shifted = np.roll(
            self._noise, zlib.crc32(f"{name} {rows.start}".encode()) % self._noise.size
        )
        return np.resize(shifted, shape)

    def int4_rows(self, name, rows):
        """Nothing is in INT4."""
        return


def main() -> None:
    """Makes the input, measures the disk and each conversion, and prints a table."""
    folder = pathlib.Path(_FOLDER.value)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "bf16"
    if not source.exists():
        _make(source)
    size = _bytes(source)
    read, write = _disk(folder, source)
    slower = min(read, write)
    largest = max(math.prod(t.shape) for t in hf_tensors(_config()).values()) * 2
    limit = 2 * largest + _GIB
    console = Console()
    console.print(
        f"{size / _GB:.2f} GB; disk reads {read / 1e6:,.0f} MB/s and writes {write / 1e6:,.0f} "
        f"MB/s; largest tensor {largest / 1e6:,.0f} MB, memory limit {limit / 1e6:,.0f} MB"
    )
    table = Table("from", "to", "s", "MB/s", "of the disk", "peak MB", "of the limit")
    for start, end in _CONVERSIONS:
        output = folder / (end if end in _INPUTS else "output")
        seconds, peak = _convert(folder / start, output, end)
        rate = max(_bytes(folder / start), _bytes(output)) / seconds
        cells = [f"{seconds:.1f}", f"{rate / 1e6:,.0f}", f"{rate / slower:.0%}"]
        table.add_row(start, end, *cells, f"{peak / 1e6:,.0f}", f"{peak / limit:.0%}")
        if end not in _INPUTS:
            _remove(output)
    console.print(table)
    _remove(folder)


def _config():
    """K2's widths, two layers, and as many experts as the size asks for."""
    base = dataclasses.replace(presets.kimi_k2(), num_layers=2, vocab_size=_VOCAB_SIZE)

    def parameters(experts: int) -> int:
        config = dataclasses.replace(base, num_routed_experts=experts)
        return count_parameters(transformer.specs(config))

    one = parameters(9) - parameters(8)
    experts = 8 + max(0, round((_SIZE_GB.value * _GB / 2 - parameters(8)) / one))
    return dataclasses.replace(base, num_routed_experts=experts)


def _make(folder: pathlib.Path) -> None:
    config = _config()
    encoder = Encoder(RandomSource(config), FileFormat.BF16, 32)
    export_hugging_face(folder, encoder, fields=to_hugging_face(config), identity="random")


def _disk(folder: pathlib.Path, source: pathlib.Path) -> tuple[float, float]:
    """Bytes a second of reading the source and of writing as much."""
    _forget(source)
    buffer = bytearray(_BLOCK)
    start = time.monotonic()
    for file in sorted(source.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    read = _bytes(source) / (time.monotonic() - start)
    block = np.random.default_rng(0).bytes(_BLOCK)
    probe = folder / "probe"
    count = max(1, _bytes(source) // _BLOCK)
    start = time.monotonic()
    with open(probe, "wb", buffering=0) as stream:
        for _ in range(count):
            stream.write(block)
        os.fsync(stream.fileno())
    write = count * _BLOCK / (time.monotonic() - start)
    probe.unlink()
    return read, write


def _convert(source: pathlib.Path, output: pathlib.Path, end: str) -> tuple[float, int]:
    """Returns seconds, and the peak of the process's memory in bytes."""
    _forget(source)
    tool = pathlib.Path(__file__).with_name("convert_checkpoint.py")
    command = [sys.executable, tool, f"--input={source}", f"--output={output}", f"--format={end}"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    require(process.returncode == 0, f"the conversion of {source} to {end} failed; see above")
    return seconds, usage.ru_maxrss * 1024


def _forget(folder: pathlib.Path) -> None:
    """Makes the operating system drop what it keeps of files in memory."""
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes(path: pathlib.Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    program.run(main)
