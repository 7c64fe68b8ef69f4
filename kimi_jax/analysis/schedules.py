"""Reads how long a TPU kernel takes from the schedule that the compiler made of it.

libtpu writes the final instruction bundles of every kernel it compiles, if asked. A bundle is what
all units of a core do in one cycle, so that bundles times trips, divided by the clock, is the time
of a kernel that waits for nothing. How often branches are taken, and how long loops are that the
operands decide on, the schedule does not say: who knows the operands does. That ranks variants of
a kernel. It is no measurement: waiting for memory is only seen as bytes over the bandwidth, and
nothing is known of stalls.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kimi_jax.analysis.costs import Chip
from kimi_jax.core.errors import ConfigError, require

# Cycles per second that fit the published peaks; that of tpu7x is taken to be v6e's.
CLOCKS: Mapping[str, float] = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 1.75e9}

# A pipelined loop over a grid goes twice more than the grid has steps: to fetch ahead, to store.
_PIPELINE_STAGES = 2
# Branches with fewer bundles are counted as always taken.
_LEAST_BRANCH = 16

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?\s*:\s*((?:> *)*)\{")
_EXIT_TEST = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
_PIPELINED = "iteration index, stage = 2"
_JUMP = re.compile(r"sbr\.rel \(!?%\w+\) *target = \$region(\d+)")
_LABEL = re.compile(r"(?:empty region|Start region|End region) (\d+)")
_COPY = re.compile(r"= dma\.")  # what the pipeline's own branches hold, and kernels' do not
_KERNEL = re.compile(r"exit bundle: %(\S+) = custom-call")


class Schedule(NamedTuple):
    """A part of a kernel: a loop, a branch, or all of it.

    Attributes:
      runs: how often it runs, each time that what is around it runs; None where the kernel's
        operands decide: for a branch, and for a loop without a constant number of trips.
      own: bundles outside the parts.
      parts: loops and branches inside, in the order of the program.
    """

    runs: int | None
    own: int
    parts: tuple["Schedule", ...] = ()


class Prediction(NamedTuple):
    """Seconds, and what they are limited by: "schedule", "compute" or "memory"."""

    seconds: float
    limit: str


class _Line(NamedTuple):
    text: str
    depth: int
    starts_loop: bool


class _Region(NamedTuple):
    """Bundles `first` to before `last`; see `Schedule.runs`."""

    first: int
    last: int
    runs: int | None
    is_loop: bool


def dump_options(folder: str) -> str:
    """Returns what LIBTPU_INIT_ARGS must hold, before libtpu is loaded, to write schedules."""
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final"
    )


def clear(folder: pathlib.Path) -> None:
    """Removes the schedules of what was compiled before."""
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()


def read_folder(folder: pathlib.Path) -> dict[str, Schedule]:
    """Returns the schedule of each Pallas kernel that was compiled, by the name it was given."""
    found = {}
    for file in sorted(folder.glob("*final_bundles.txt")):
        text = file.read_text()
        name = _KERNEL.search(text)
        if name is not None:
            found[name.group(1).partition(".")[0]] = read(text)
    return found


def read(text: str) -> Schedule:
    """Returns the loops and branches of a kernel, and their bundles.

    Raises:
      ConfigError: a loop has several exit tests.
    """
    lines = list(_bundles(text))
    loops = [loop for depth in _depths(lines) for loop in _loops(lines, depth)]
    branches = [b for b in _branches(lines) if not _only_guards(b, loops)]
    # What is around others comes first.
    regions = sorted(loops + branches, key=lambda r: (r.first, -r.last))
    return _nest(_Region(0, len(lines), 1, is_loop=False), regions)


def bundles(schedule: Schedule, frequencies: Sequence[float]) -> float:
    """Counts the bundles that one core executes.

    Args:
      schedule: of the kernel.
      frequencies: for each branch, in which share of the times that it is met it is taken; for each
        loop of no constant length, its mean trips. In the order of the program, and what is around
        before what is inside.

    Raises:
      ConfigError: there are not as many frequencies as such branches and loops.
    """
    unknown = _unknown(schedule)
    require(
        len(frequencies) == unknown,
        f"the schedule has {unknown} branches of at least {_LEAST_BRANCH} bundles and loops of no "
        f"constant length, and {len(frequencies)} frequencies were given; give one for each "
        "`pl.when` and each such loop that the compiler left",
    )
    return _executed(schedule, iter(frequencies))


def predict(
    executed: float, clock: float, chip: Chip, *, flops: float, moved_bytes: float
) -> Prediction:
    """Returns max(bundles / clock, flops / peak, bytes / bandwidth)."""
    parts = {
        "schedule": executed / clock,
        "compute": flops / chip.flops,
        "memory": moved_bytes / chip.memory_bandwidth,
    }
    limit = max(parts, key=parts.__getitem__)
    return Prediction(parts[limit], limit)


def _bundles(text: str) -> Iterator[_Line]:
    """Yields one item a bundle; comments that go on in further lines are joined to it."""
    line = None
    for part in text.splitlines():
        match = _BUNDLE.match(part)
        if match:
            if line is not None:
                yield line
            # The depth of an empty bundle is not written.
            empty = line is not None and part[match.end() :].startswith("}")
            depth = line.depth if empty else match.group(2).count(">")
            line = _Line(part, depth, match.group(1) in ("LB", "LH"))
        elif line is not None:
            line = line._replace(text=f"{line.text} {part}")
    if line is not None:
        yield line


def _unknown(schedule: Schedule) -> int:
    return (schedule.runs is None) + sum(map(_unknown, schedule.parts))


def _executed(schedule: Schedule, frequencies: Iterator[float]) -> float:
    runs = next(frequencies) if schedule.runs is None else schedule.runs
    return runs * (schedule.own + sum(_executed(part, frequencies) for part in schedule.parts))


def _nest(outer: _Region, inside: Sequence[_Region]) -> Schedule:
    """Returns the part that a region is, given those inside it in the order of the program."""
    parts, own, i = [], outer.last - outer.first, 0
    while i < len(inside):
        region = inside[i]
        end = i + 1
        while end < len(inside) and inside[end].first < region.last:
            end += 1
        parts.append(_nest(region, inside[i + 1 : end]))
        own -= region.last - region.first
        i = end
    return Schedule(outer.runs, own, tuple(parts))


def _depths(lines: Sequence[_Line]) -> range:
    return range(1, max((line.depth for line in lines), default=0) + 1)


def _loops(lines: Sequence[_Line], depth: int) -> Iterator[_Region]:
    """Yields the loops at a depth."""
    first = None
    for i, line in enumerate([*lines, _Line("", 0, starts_loop=False)]):
        ends = line.depth < depth or (line.depth == depth and line.starts_loop)
        if first is not None and ends:
            # What does not start as a loop is the rest of one, unrolled.
            if lines[first].starts_loop:
                yield _Region(first, i, _trips(lines[first:i], depth), is_loop=True)
            first = None
        if first is None and line.depth >= depth:
            first = i


def _trips(body: Sequence[_Line], depth: int) -> int | None:
    """Returns the trips of a loop, None where they are not constant."""
    own = [line.text for line in body if line.depth == depth]
    tests = [int(n) for text in own for n in _EXIT_TEST.findall(text)]
    if len(tests) > 1:
        raise ConfigError(
            f"a loop of {len(body)} bundles at depth {depth} has {len(tests)} exit tests against "
            "a constant; only loops with one can be predicted"
        )
    if not tests:
        return None
    pipelined = any(_PIPELINED in text for text in own)
    return tests[0] - _PIPELINE_STAGES if pipelined else tests[0]


def _branches(lines: Sequence[_Line]) -> list[_Region]:
    """Returns the kernel's own branches: those inside the branch that is a step of the grid."""
    labels: dict[str, int] = {}
    for i, line in enumerate(lines):
        for label in _LABEL.findall(line.text):
            labels.setdefault(label, i)
    found = [
        _Region(i + 1, labels[target], None, is_loop=False)
        for i, line in enumerate(lines)
        for target in _JUMP.findall(line.text)
        if labels.get(target, 0) - i > _LEAST_BRANCH
    ]
    return [
        branch
        for branch in found
        if any(_within(branch, other) for other in found)
        and not any(_COPY.search(line.text) for line in lines[branch.first : branch.last])
    ]


def _only_guards(branch: _Region, loops: Sequence[_Region]) -> bool:
    """Whether a branch only asks if a loop has any trips, which its mean trips say as well."""
    size = branch.last - branch.first
    return any(
        loop.runs is None
        and _within(loop, branch)
        and size - (loop.last - loop.first) < _LEAST_BRANCH
        for loop in loops
    )


def _within(inner: _Region, outer: _Region) -> bool:
    return inner[:2] != outer[:2] and outer.first <= inner.first and inner.last <= outer.last
