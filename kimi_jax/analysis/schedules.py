"""Reads how long a TPU kernel takes from the schedule that the compiler made of it.

libtpu writes the final instruction bundles of every kernel it compiles, if asked. A bundle is what
all units of a core do in one cycle, so that bundles times trips, divided by the clock, is the time
of a kernel that waits for nothing. That ranks variants of a kernel. It is no measurement: waiting
for memory is only seen as bytes over the bandwidth, and nothing is known of stalls.
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
# Branches with fewer bundles are the pipeline's own and are counted as always taken.
_LEAST_BRANCH = 40

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?\s*:\s*((?:> *)*)\{")
_EXIT_TEST = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
_PIPELINED = "iteration index, stage = 2"
_JUMP = re.compile(r"sbr\.rel \(!?%\w+\) *target = \$region(\d+)")
_LABEL = re.compile(r"(?:empty region|Start region|End region) (\d+)")
_KERNEL = re.compile(r"exit bundle: %(\S+) = custom-call")


class Schedule(NamedTuple):
    """Bundles that one core executes.

    Attributes:
      always: outside the kernel's own branches.
      branches: inside each of them, if every step of the grid took it.
    """

    always: int
    branches: tuple[int, ...]


class Prediction(NamedTuple):
    """Seconds, and what they are limited by: "schedule", "compute" or "memory"."""

    seconds: float
    limit: str


class _Line(NamedTuple):
    text: str
    depth: int
    starts_loop: bool


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
    """Returns the schedule of each Pallas kernel that was compiled, by its name."""
    found = {}
    for file in sorted(folder.glob("*final_bundles.txt")):
        text = file.read_text()
        name = _KERNEL.search(text)
        if name is not None:
            found[name.group(1)] = read(text)
    return found


def read(text: str) -> Schedule:
    """Counts the bundles of a kernel, times the trips of the loops around them.

    Raises:
      ConfigError: a loop's number of trips is not in the schedule.
    """
    lines = list(_bundles(text))
    trips = _trips(lines)
    branches = _branches(lines)
    inside = [False] * len(lines)
    for first, last in branches:
        inside[first:last] = [True] * (last - first)
    return Schedule(
        always=sum(trip for trip, hidden in zip(trips, inside, strict=True) if not hidden),
        branches=tuple(sum(trips[first:last]) for first, last in branches),
    )


def bundles(schedule: Schedule, shares: Sequence[float]) -> float:
    """Counts the bundles executed when each branch is taken in a share of the grid's steps.

    Raises:
      ConfigError: there are not as many shares as branches.
    """
    require(
        len(shares) == len(schedule.branches),
        f"the schedule has {len(schedule.branches)} branches of at least {_LEAST_BRANCH} bundles, "
        f"and {len(shares)} shares were given; give one for each `pl.when` that the compiler left",
    )
    taken = zip(schedule.branches, shares, strict=True)
    return schedule.always + sum(branch * share for branch, share in taken)


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


def _trips(lines: Sequence[_Line]) -> list[int]:
    """Returns for each bundle the product of the trips of all loops around it."""
    trips = [1] * len(lines)
    for depth in range(1, max((line.depth for line in lines), default=0) + 1):
        for first, last in _loops(lines, depth):
            count = _trips_of_loop(lines[first:last], depth)
            for i in range(first, last):
                trips[i] *= count
    return trips


def _loops(lines: Sequence[_Line], depth: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of the loops at a depth."""
    first = None
    for i, line in enumerate(lines):
        ends = line.depth < depth or (line.depth == depth and line.starts_loop)
        if first is not None and ends:
            yield first, i
            first = None
        if first is None and line.depth >= depth:
            first = i
    if first is not None:
        yield first, len(lines)


def _trips_of_loop(body: Sequence[_Line], depth: int) -> int:
    if not body[0].starts_loop:
        return 1  # the rest of what was a loop, unrolled
    own = [line.text for line in body if line.depth == depth]
    tests = [int(n) for text in own for n in _EXIT_TEST.findall(text)]
    if len(tests) != 1:
        raise ConfigError(
            f"a loop of {len(body)} bundles at depth {depth} has {len(tests)} exit tests against a "
            "constant, not one; only loops with a fixed number of trips can be predicted"
        )
    pipelined = any(_PIPELINED in text for text in own)
    return tests[0] - _PIPELINE_STAGES if pipelined else tests[0]


def _branches(lines: Sequence[_Line]) -> list[tuple[int, int]]:
    """Returns the ranges of the kernel's own branches: those inside the branch that is a step."""
    labels: dict[str, int] = {}
    for i, line in enumerate(lines):
        for label in _LABEL.findall(line.text):
            labels.setdefault(label, i)
    found = [
        (i + 1, labels[target])
        for i, line in enumerate(lines)
        for target in _JUMP.findall(line.text)
        if labels.get(target, 0) - i > _LEAST_BRANCH
    ]
    nested = [b for b in found if any(_within(b, other) for other in found)]
    return [b for b in nested if not any(_within(b, other) for other in nested)]


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
