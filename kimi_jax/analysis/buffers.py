"""Which values fill the memory where it is fullest, from the compiler's own buffer assignment.

The compiler writes two files when it is asked to dump (`dump_options`): which value lies where, and
from which to which instruction it is needed.
"""

import dataclasses
import pathlib
import re

from kimi_jax.analysis import hlo

_ALLOCATION = re.compile(r"^allocation \d+: size \d+(?P<kind>.*)$")
_VALUE = re.compile(
    r"^ value: <\d+ (?P<name>\S+) @\d+> \(size=(\d+),offset=(\d+)\): (?P<shape>.*)$"
)
_RANGE = re.compile(r"^\s+(?P<name>\S+?)(?P<index>\{[\d,]*\}):(\d+)-(\d+)$")
_TEMPORARY = "preallocated-temp"
_COLOR = re.compile(r"color (\d+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One piece of memory that is in use where memory is fullest.

    Attributes:
      bytes: its size, with the padding of the layout.
      shape: such as bf16[8,128].
      name: of the instruction that fills it.
      operation_name: scopes and primitive that the instruction comes from; may be empty.
    """

    bytes: int
    shape: str
    name: str
    operation_name: str = ""


def dump_options(folder: str) -> dict[str, str | bool]:
    """Returns compiler options that make the compiler write its buffer assignment into a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def read_dump(folder: pathlib.Path) -> tuple[Buffer, ...]:
    """Reads the dump of the largest program in a folder; see `buffers_at_peak`.

    Works for programs that do not fit, too: the compiler writes before it gives up.

    Raises:
      FileNotFoundError: the compiler has written no buffer assignment.
    """
    assignments = sorted(
        folder.glob("*buffer-assignment.txt"), key=lambda file: -file.stat().st_size
    )
    if not assignments:
        raise FileNotFoundError(f"the compiler has written no buffer assignment into {folder}")
    stem = assignments[0].name.removesuffix("buffer-assignment.txt")
    live_ranges = (folder / f"{stem}live-range.txt").read_text()
    found = buffers_at_peak(assignments[0].read_text(), live_ranges)
    program = folder / f"{stem.removesuffix('-')}.txt"
    return name_operations(found, hlo.parse(program.read_text()))


def buffers_at_peak(assignment: str, live_ranges: str) -> tuple[Buffer, ...]:
    """Finds the temporaries that are in use at the instruction where they are the most.

    Args:
      assignment: text of the file `...buffer-assignment.txt`.
      live_ranges: text of the file `...live-range.txt`.

    Returns:
      The largest first. Values that lie in the same place (results of updates in place) count once.
    """
    ranges = _parse_ranges(live_ranges)
    values = [v for v in _parse_temporaries(assignment) if v[0] in ranges]
    changes: dict[int, int] = {}
    for name, size, _, _ in values:
        start, end = ranges[name]
        changes[start] = changes.get(start, 0) + size
        changes[end] = changes.get(end, 0) - size
    live = most = peak = 0
    for when in sorted(changes):
        live += changes[when]
        if live > most:
            most, peak = live, when
    places = {}
    for name, size, offset, shape in values:
        start, end = ranges[name]
        if start <= peak < max(end, start + 1):
            instruction = name.partition("{")[0]
            places.setdefault(offset, Buffer(size, shape.partition("{")[0], instruction))
    return tuple(sorted(places.values(), key=lambda buffer: -buffer.bytes))


def name_operations(buffers: tuple[Buffer, ...], module: hlo.Module) -> tuple[Buffer, ...]:
    """Adds where in the program each buffer's instruction comes from."""
    names = {
        name: instruction.operation_name
        for computation in module.computations.values()
        for name, instruction in computation.instructions.items()
    }
    return tuple(dataclasses.replace(b, operation_name=names.get(b.name, "")) for b in buffers)


def _parse_temporaries(text: str) -> list[tuple[str, int, int, str]]:
    """Returns (name, size, offset, shape) of the values in the main memory's temporaries."""
    values = []
    is_temporary = False
    for line in text.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation:
            color = _COLOR.search(allocation["kind"])
            is_temporary = _TEMPORARY in allocation["kind"] and color is None
        elif is_temporary and (value := _VALUE.match(line)):
            name = value["name"].removesuffix("{}")
            values.append((name, int(value[2]), int(value[3]), value["shape"]))
    return values


def _parse_ranges(text: str) -> dict[str, tuple[int, int]]:
    """Returns the first and last place of need of each value, by name and place in its tuple."""
    _, _, text = text.partition("BufferLiveRange:")
    ranges = {}
    for line in text.splitlines():
        match = _RANGE.match(line)
        if match:
            index = match["index"] if match["index"] != "{}" else ""
            ranges[match["name"] + index] = (int(match[3]), int(match[4]))
    return ranges
