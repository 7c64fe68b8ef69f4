"""What stored tensors hold, and how two sets of them differ; read in blocks of rows."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from kimi_jax.interop.safetensors_header import DTYPES, TensorInfo

_BLOCK_BYTES = 1 << 21
_COUNTED_BITS = 16


@runtime_checkable
class Tensors(Protocol):
    """Tensors by name, whatever they are stored in: a `SafetensorsFolder` is one.

    `dequantized_tensors.py` has another, in which quantised weights are values.
    """

    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns rows of the first dimension of a tensor."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors that differ in the numbers in their names only.

    Attributes:
      pattern: their names, such as `model.layers.{1..60}.mlp.gate.weight`.
      key: what else they have in common.
      names: of all of them.
      expected: how many there would be, had they all combinations of these numbers.
    """

    pattern: str
    key: Hashable
    names: tuple[str, ...]
    expected: int


@dataclasses.dataclass(frozen=True)
class Norms:
    """Size of the values of a tensor: how many are finite, their squares' sum, the largest."""

    num_finite: int = 0
    sum_squares: float = 0.0
    largest: float = 0.0
    num_non_finite: int = 0

    @property
    def rms(self) -> float:
        """Root mean square of the finite values."""
        return math.sqrt(self.sum_squares / max(self.num_finite, 1))

    def __add__(self, other: "Norms") -> "Norms":
        return Norms(
            self.num_finite + other.num_finite,
            self.sum_squares + other.sum_squares,
            max(self.largest, other.largest),
            self.num_non_finite + other.num_non_finite,
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two tensors of one shape are apart.

    Attributes:
      num_values: that differ; two NaN do not.
      absolute: largest |a - b|; infinite where one value is not finite.
      relative: largest |a - b| / max(|a|, |b|), at most 2; infinite where `absolute` is.
    """

    num_values: int = 0
    absolute: float = 0.0
    relative: float = 0.0


def group(keys: Mapping[str, Hashable]) -> list[Group]:
    """Groups names that have the same key and differ in numbers between dots only.

    Args:
      keys: what tells tensors apart besides their names, such as shape and dtype, by name.

    Returns:
      The groups, in the order of their first members.
    """
    members: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        template = tuple("" if part.isdecimal() else part for part in name.split("."))
        members.setdefault((template, key), []).append(name)
    return [_make_group(key, names) for (_, key), names in members.items()]


def norms(source: Tensors, name: str, advance: Callable[[int], None]) -> Norms | None:
    """Returns the norms of a tensor, or None if it does not hold floating-point values.

    Args:
      source: what holds it.
      name: of the tensor.
      advance: called with the bytes that were read, block by block.
    """
    total, info = Norms(), source.tensors[name]
    if not is_floating(info):
        advance(info.num_bytes)
        return None
    for rows in _blocks(info):
        block = source.read(name, rows)
        total += _norms_of(*_values_and_counts(block))
        advance(block.nbytes)
    return total


def difference(
    left: Tensors, right: Tensors, name: str, advance: Callable[[int], None]
) -> Difference:
    """Returns how far two tensors of one name and shape are apart; dtypes may differ.

    Args:
      left: holds one of them.
      right: holds the other.
      name: of both.
      advance: called with the bytes that were read on both sides, block by block.
    """
    total = Difference()
    for rows in _blocks(left.tensors[name]):
        a, b = left.read(name, rows), right.read(name, rows)
        if not _same_bits(a, b):
            found = _block_difference(_exact(a), _exact(b))
            total = Difference(
                total.num_values + found.num_values,
                max(total.absolute, found.absolute),
                max(total.relative, found.relative),
            )
        advance(a.nbytes + b.nbytes)
    return total


def is_floating(info: TensorInfo) -> bool:
    """True for floating-point values: False for codes, counts and masks."""
    return DTYPES[info.dtype].kind not in "biu"


def _make_group(key: Hashable, names: list[str]) -> Group:
    parts, expected = [], 1
    for column in zip(*(name.split(".") for name in names), strict=True):
        if column[0].isdecimal():
            numbers = sorted({int(number) for number in column})
            expected *= len(numbers)
            parts.append(_ranges(numbers))
        else:
            parts.append(column[0])
    return Group(".".join(parts), key, tuple(names), expected)


def _ranges(numbers: list[int]) -> str:
    """Writes sorted numbers like `7` or `{0..3,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"


def _blocks(info: TensorInfo) -> Iterator[slice | None]:
    """Rows to read at once: at least one, and about `_BLOCK_BYTES`; None for a scalar."""
    if not info.shape:
        yield None
        return
    num_rows = info.shape[0]
    step = max(1, _BLOCK_BYTES * num_rows // max(info.num_bytes, 1))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _exact(block: np.ndarray) -> np.ndarray:
    """float64 holds every value of every format here, except integers beyond 2^53."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return block.astype(np.float64)


def _values_and_counts(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a block, and how often each occurs.

    Formats of 8 and 16 bits have so few values that counting is ten times faster than converting.
    """
    bits = 8 * block.dtype.itemsize
    if bits > _COUNTED_BITS:
        values = _exact(block).reshape(-1)
        return values, np.ones_like(values)
    raw = block.reshape(-1).view(f"u{block.dtype.itemsize}")
    values = _exact(np.arange(1 << bits, dtype=raw.dtype).view(block.dtype))
    if bits == _COUNTED_BITS:
        return values, np.bincount(raw, minlength=values.size)
    paired = raw.size // 2 * 2  # bytes are counted two at a time
    counts = np.bincount(raw[:paired].view("u2"), minlength=values.size**2)
    counts = counts.reshape(values.size, values.size)
    rest = np.bincount(raw[paired:], minlength=values.size)
    return values, counts.sum(axis=0) + counts.sum(axis=1) + rest


def _norms_of(values: np.ndarray, counts: np.ndarray) -> Norms:
    finite = np.isfinite(values) & (counts > 0)
    kept, times = values[finite], counts[finite]
    num_finite = int(times.sum())
    return Norms(
        num_finite=num_finite,
        sum_squares=float(np.sum(times * np.square(kept))),
        largest=float(np.abs(kept).max(initial=0.0)),
        num_non_finite=int(counts.sum()) - num_finite,
    )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(*(x.reshape(-1).view(np.uint8) for x in (a, b)))


def _block_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not differs.any():
        return Difference()
    a, b = a[differs], b[differs]
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return Difference(a.size, math.inf, math.inf)
    distance = np.abs(a - b)
    relative = distance / np.maximum(np.abs(a), np.abs(b))
    return Difference(a.size, float(distance.max()), float(relative.max()))
