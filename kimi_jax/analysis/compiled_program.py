"""What a compiled program does on one device: operations, memory traffic, communication.

All figures count loop bodies as often as they run, which XLA's own cost analysis does not.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping

from kimi_jax.analysis import hlo, work
from kimi_jax.analysis.collectives import Collective, collective
from kimi_jax.analysis.executions import Executions, executions
from kimi_jax.analysis.hlo import Computation, Instruction, Module
from kimi_jax.analysis.scopes import FORWARD, Scope, read_scope

_ELSEWHERE = Scope("(no scope)", FORWARD)
# Orders branches by operations, and by traffic where they have none.
_FLOPS_PER_BYTE = 100.0


@dataclasses.dataclass
class Work:
    """Sums over a part of the program, for one device.

    Attributes:
      flops: operations of matrix products.
      bytes: traffic with the main memory.
      sent: bytes sent to other devices, by mesh axes.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: dict[tuple[str, ...], float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
    """All collectives of one kind along the same mesh axes.

    Attributes:
      kind: such as all-gather.
      axes: mesh axes.
      count: runs.
      bytes: what one device sends.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """What a program does on one device.

    Attributes:
      scopes: work by part of the program.
      collectives: communication by kind and mesh axes, the most bytes first.
      groups: for each combination of mesh axes, one group of devices that communicate.
      unknown_loops: scopes of loops whose trip counts depend on data; counted as one trip.
      unknown_calls: targets of custom calls without a stated cost, with runs; counted as nothing.
    """

    scopes: dict[Scope, Work]
    collectives: tuple[CollectiveSum, ...]
    groups: dict[tuple[str, ...], tuple[int, ...]]
    unknown_loops: tuple[str, ...]
    unknown_calls: dict[str, float]

    @property
    def total(self) -> Work:
        """Sum over all scopes."""
        total = Work()
        for part in self.scopes.values():
            add_work(total, part)
        return total


def add_work(total: Work, part: Work, times: float = 1.0) -> None:
    """Adds `times * part` to `total`."""
    total.flops += times * part.flops
    total.bytes += times * part.bytes
    for axes, sent in part.sent.items():
        total.sent[axes] = total.sent.get(axes, 0.0) + times * sent


def read_program(
    text: str,
    axis_sizes: Mapping[str, int],
    *,
    device: int = 0,
    scope_depth: int = 4,
    skip_scopes: tuple[str, ...] = (),
) -> ProgramReport:
    """Reads the text of a compiled program.

    Args:
      text: from `jax.stages.Compiled.as_text()`.
      axis_sizes: the mesh it was compiled for.
      device: the device to report on; trip counts may depend on it.
      scope_depth: how many levels of named scopes to tell apart.
      skip_scopes: scopes to leave out of the names.
    """
    return report_device(
        hlo.parse(text),
        axis_sizes,
        device=device,
        scope_depth=scope_depth,
        skip_scopes=skip_scopes,
    )


def report_device(
    module: Module,
    axis_sizes: Mapping[str, int],
    *,
    device: int = 0,
    scope_depth: int = 4,
    skip_scopes: tuple[str, ...] = (),
) -> ProgramReport:
    """Reports on one device of a program that has been read; arguments as of `read_program`."""
    runs = executions(module, device=device, weight=functools.partial(_weight, module=module))
    read = functools.partial(read_scope, depth=scope_depth, skip=skip_scopes)
    scopes: dict[Scope, Work] = collections.defaultdict(Work)
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0]
    )
    groups: dict[tuple[str, ...], tuple[int, ...]] = {}
    unknown_calls: collections.Counter[str] = collections.Counter()
    inherited: dict[str, Scope] = {}
    for name, times in runs.counts.items():
        computation = module.computations[name]
        inherited[name] = _inherited_scope(name, runs, inherited, module, read)
        for instruction in computation.instructions.values():
            part, moved = _work_of(instruction, computation, module, axis_sizes, name in runs.fused)
            if work.flops(instruction, computation) is None:
                unknown_calls[instruction.attribute("custom_call_target").strip('"')] += times
            if part == Work():
                continue
            scope = _scope_of(instruction, computation, read) or inherited[name]
            add_work(scopes[scope], part, times)
            if moved is not None:
                groups.setdefault(moved.axes, tuple(moved.groups[0].tolist()))
                count, sent = sums.get((moved.kind, moved.axes), (0.0, 0.0))
                sums[moved.kind, moved.axes] = count + times, sent + times * moved.bytes
    collectives = [CollectiveSum(*key, *values) for key, values in sums.items()]
    return ProgramReport(
        scopes=dict(scopes),
        collectives=tuple(sorted(collectives, key=lambda c: -c.bytes)),
        groups=groups,
        unknown_loops=tuple(loop.operation_name or loop.name for loop in runs.unknown_loops),
        unknown_calls=dict(unknown_calls),
    )


def _inherited_scope(
    name: str,
    runs: Executions,
    inherited: dict[str, Scope],
    module: Module,
    read: Callable[[str], Scope | None],
) -> Scope:
    """Returns the scope of whoever calls a computation; callers come before what they call."""
    if runs.callers[name] is None:
        return _ELSEWHERE
    caller, place = runs.callers[name]
    return _scope_of(caller, module.computations[place], read) or inherited[place]


def _scope_of(
    instruction: Instruction,
    computation: Computation,
    read: Callable[[str], Scope | None],
    steps: int = 2,
) -> Scope | None:
    """Returns an instruction's scope, or, as compilers leave names out, its neighbours' deepest."""
    scope = read(instruction.operation_name)
    if scope is not None or steps == 0:
        return scope
    operands = [computation.instructions[name] for name in instruction.operands]
    found = (
        _scope_of(neighbour, computation, read, steps - 1)
        for neighbour in computation.users[instruction.name] + operands
    )
    return max(filter(None, found), key=lambda scope: scope.name.count("/"), default=None)


def _work_of(
    instruction: Instruction,
    computation: Computation,
    module: Module,
    axis_sizes: Mapping[str, int],
    fused: bool,
) -> tuple[Work, Collective | None]:
    """Counts one run of one instruction, without what it calls."""
    moved = collective(instruction, computation, axis_sizes, module.num_partitions)
    return (
        Work(
            flops=work.flops(instruction, computation) or 0.0,
            bytes=0.0 if fused else float(work.main_memory_bytes(instruction, computation, module)),
            sent={} if moved is None else {moved.axes: moved.bytes},
        ),
        moved,
    )


def _weight(computation: Computation, *, module: Module) -> float:
    """Compares branches: the work of one run, loops inside counted once."""
    total = 0.0
    for instruction in computation.instructions.values():
        total += work.flops(instruction, computation) or 0.0
        total += _FLOPS_PER_BYTE * work.main_memory_bytes(instruction, computation, module)
        for called in instruction.called:
            if instruction.opcode in ("while", "conditional", "call", "fusion"):
                total += _weight(module.computations[called], module=module)
    return total
