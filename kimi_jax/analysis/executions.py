"""How often each computation of a compiled program runs on one device."""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from kimi_jax.analysis.hlo import Computation, Instruction, Module
from kimi_jax.analysis.integer_values import Frame, entry_frame

# Opcodes that run other computations once. What a reduction or a sort applies to its elements is
# left out: it is arithmetic between scalars.
_CALLS = frozenset({"fusion", "call", "call-start", "async-start", "custom-call"})
_MOST_SEPARATE_ITERATIONS = 4096


@dataclasses.dataclass(frozen=True)
class Executions:
    """Runs of each computation in one run of the program.

    Attributes:
      counts: runs by name of the computation; those of an inner loop's body may be an average.
      callers: the instruction that runs it and the name of the computation around that; None for
        the entry.
      fused: names of computations that run inside a fusion, whose values stay on the chip.
      unknown_loops: loops whose trip counts depend on data, counted as one trip.
    """

    counts: dict[str, float]
    callers: dict[str, tuple[Instruction, str] | None]
    fused: frozenset[str]
    unknown_loops: tuple[Instruction, ...]


def executions(
    module: Module, *, device: int, weight: Callable[[Computation], float]
) -> Executions:
    """Counts the runs of every computation.

    A loop whose bound depends on the counter of an enclosing loop is counted in each iteration of
    that loop. Of a conditional whose predicate depends on data, the heaviest branch runs.

    Args:
      module: the program.
      device: number of the device, on which some trip counts depend.
      weight: work of one run of a computation, to compare branches.
    """
    count = _Count(module, weight)
    count.visit(entry_frame(module, device), 1.0, fused=False)
    return Executions(
        dict(count.counts),
        {module.entry.name: None} | count.callers,
        frozenset(count.fused),
        tuple(count.unknown.values()),
    )


class _Count:
    """Accumulates `Executions`."""

    def __init__(self, module: Module, weight: Callable[[Computation], float]):
        self.module = module
        self.weight = weight
        self.counts: collections.Counter[str] = collections.Counter()
        self.callers: dict[str, tuple[Instruction, str]] = {}
        self.fused: set[str] = set()
        self.unknown: dict[str, Instruction] = {}

    def visit(self, frame: Frame, times: float, *, fused: bool) -> None:
        """Counts `times` runs of a frame's computation and of all that it calls."""
        name = frame.computation.name
        self.counts[name] += times
        if fused:
            self.fused.add(name)
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "while":
                self.callers[instruction.called[0]] = (instruction, name)
                self._visit_loop(frame, instruction, times)
            elif instruction.opcode == "conditional":
                branch = self._branch(frame, instruction)
                self.callers[branch] = (instruction, name)
                self._visit_branch(frame, instruction, branch, times)
            elif instruction.opcode in _CALLS:
                for called in instruction.called:
                    self.callers[called] = (instruction, name)
                    inside = fused or instruction.opcode == "fusion"
                    self.visit(frame.call(instruction, called), times, fused=inside)

    def _visit_loop(self, frame: Frame, loop: Instruction, times: float) -> None:
        trips = _trip_count(frame, loop)
        if trips is None:
            self.unknown[loop.name] = loop
            trips = 1
        if trips == 0:
            return
        body = frame.body(loop)
        counter = frame.iterations(loop)
        blind = _unknown_inside(body)
        if counter is not None and blind and trips <= _MOST_SEPARATE_ITERATIONS:
            place, first, step = counter
            start = frame.body(loop, {place: np.asarray(first)})
            if _unknown_inside(start) < blind:
                for trip in range(trips):
                    at = {place: np.asarray(first + trip * step)}
                    self.visit(frame.body(loop, at), times, fused=False)
                return
        self.visit(body, times * trips, fused=False)

    def _branch(self, frame: Frame, conditional: Instruction) -> str:
        chosen = frame.value(conditional.operands[0])
        branches = conditional.called
        if chosen is not None:
            if conditional.attribute("true_computation"):
                return branches[0] if bool(chosen) else branches[1]
            is_predicate = chosen.dtype == bool and len(branches) == 2
            number = 1 - int(chosen) if is_predicate else int(chosen)
            return branches[number if 0 <= number < len(branches) else -1]
        return max(branches, key=lambda name: self.weight(self.module.computations[name]))

    def _visit_branch(
        self, frame: Frame, conditional: Instruction, branch: str, times: float
    ) -> None:
        operand = conditional.operands[1 + conditional.called.index(branch)]
        inside = frame.call(dataclasses.replace(conditional, operands=(operand,)), branch)
        self.visit(inside, times, fused=False)


def _trip_count(frame: Frame, loop: Instruction) -> int | None:
    """Returns the trip count, which the CPU and GPU compilers write down."""
    _, found, rest = loop.attributes.partition('"known_trip_count":{"n":"')
    return int(rest.partition('"')[0]) if found else frame.trip_count(loop)


def _unknown_inside(frame: Frame) -> int:
    """Counts the loops in a frame, at any depth, whose trip counts are not known."""
    unknown = 0
    for instruction in frame.computation.instructions.values():
        if instruction.opcode == "while":
            unknown += _trip_count(frame, instruction) is None
            unknown += _unknown_inside(frame.body(instruction))
    return unknown
