"""Finds the sizes of tiles with which kernels are fastest, and keeps them in the package.

    python tools/tune_kernels.py --chip=v6e --kernels=int4_matmul

For a TPU, which need not be there (extra `aot`), every choice of tiles is compiled and ranked by
the compiler's final schedule: max(bundles / clock, operations / peak, bytes / bandwidth). Such a
prediction ranks; it is no measurement. The clock of tpu7x is taken to be v6e's: its times compare
tiles, not chips. For a GPU, which must be there, every choice is timed.

The best of each case goes into kimi_jax/kernels/tile_tables/<chip>.json, if that holds no better
one.
"""

import importlib
import itertools
import json
import os
import pathlib
import pkgutil
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tile_entries import Entry, merge, to_text

import kimi_jax.kernels
from kimi_jax.analysis import costs, schedules
from kimi_jax.core.errors import ConfigError, require
from kimi_jax.kernels.tunable import Tunable
from kimi_jax.parallel import topologies

_CHIP = flags.DEFINE_enum("chip", None, [*schedules.CLOCKS, "h100", "h200"], "what to tune for")
_KERNELS = flags.DEFINE_string("kernels", ".*", "kernels whose whole name matches, all otherwise")
_CASES = flags.DEFINE_string("cases", ".*", "cases whose whole name matches, all otherwise")
_TILES = flags.DEFINE_string("tiles", ".*", "choices that match, as the table prints them")
_SHOWN = flags.DEFINE_integer("shown", 3, "choices shown for each case", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "table to write; the package's otherwise")
_WRITE = flags.DEFINE_bool("write", True, "whether to write the table")
_REPLACE = flags.DEFINE_bool(
    "replace",
    False,
    "whether what is found replaces entries that are as fast, as it must where a kernel has become "
    "slower",
)
flags.mark_flag_as_required("chip")

_TABLES = pathlib.Path(kimi_jax.kernels.__path__[0]) / "tile_tables"
_ARRANGEMENTS = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
_TIMED_CALLS = 20
_REASON = 300  # characters of an error that are shown
_MICRO = 1e6


class Job(NamedTuple):
    """One choice of tiles for one case of one kernel."""

    kernel: str
    tunable: Tunable
    name: str
    case: Any
    tiles: dict[str, int]


class Result(NamedTuple):
    """What became of a job: seconds, or why there are none."""

    job: Job
    seconds: float | None
    remark: str
    bundles: float = 0.0  # decide between choices that memory limits alike


def main(argv: list[str]) -> None:
    """Tries all, prints, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    chip = _CHIP.value
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        run = _timer() if chip in topologies.GPU_KINDS else _predictor(chip, pathlib.Path(folder))
        results = _run_all(list(_jobs(chip)), run, console)
    _print(results, chip, console)
    if _WRITE.value:
        for entry in _write(_found(results), _file()):
            line = f"not written, the table has as fast a one (--replace): {json.dumps(entry)}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(f"written: {_file()}")


def _file() -> pathlib.Path:
    return pathlib.Path(_OUTPUT.value or _TABLES / f"{_CHIP.value}.json")


def _jobs(chip: str) -> Iterator[Job]:
    """Yields every choice of every case that was asked for."""
    module_name = "pallas_gpu" if chip in topologies.GPU_KINDS else "pallas_tpu"
    for package in pkgutil.iter_modules(kimi_jax.kernels.__path__):
        folder = pathlib.Path(kimi_jax.kernels.__path__[0]) / package.name
        if not (folder / f"{module_name}.py").is_file():
            continue
        has_own = (folder / f"{module_name}_tuning.py").is_file()
        file = f"{module_name}_tuning" if has_own else module_name
        module = importlib.import_module(f"kimi_jax.kernels.{package.name}.{file}")
        cases = importlib.import_module(f"kimi_jax.kernels.{package.name}.cases").KIMI_K2
        for kernel, tunable in getattr(module, "TUNABLE", {}).items():
            if re.fullmatch(_KERNELS.value, kernel):
                yield from _jobs_of(kernel, tunable, cases, chip)


def _jobs_of(kernel: str, tunable: Tunable, cases: dict, chip: str) -> Iterator[Job]:
    for name, case in cases.items():
        if re.fullmatch(_CASES.value, name):
            for tiles in tunable.candidates(case, chip):
                if re.fullmatch(_TILES.value, _shown(tiles)):
                    yield Job(kernel, tunable, name, case, dict(tiles))


def _run_all(jobs: list[Job], run: Callable[[Job], Result], console: Console) -> list[Result]:
    """Runs all jobs; what was found is written after each case."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    results: list[Result] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tuning", total=len(jobs))
        for _, of_case in itertools.groupby(jobs, key=lambda job: (job.kernel, job.name)):
            for job in of_case:
                progress.update(task, description=f"{job.kernel} {job.name} {_shown(job.tiles)}")
                results.append(run(job))
                _report_failure(results[-1], console)
                progress.advance(task)
            if _WRITE.value:
                _write(_found(results), _file())
    return results


def _report_failure(result: Result, console: Console) -> None:
    if result.seconds is None:
        job = result.job
        line = f"failed: {job.kernel} {job.name} {_shown(job.tiles)}: {result.remark}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _predictor(chip: str, folder: pathlib.Path) -> Callable[[Job], Result]:
    """Returns what compiles a job for an absent TPU and reads its schedule."""
    os.environ["LIBTPU_INIT_ARGS"] = schedules.dump_options(str(folder))
    topologies.prepare_environment()
    import jax

    device = topologies.absent_devices(f"{chip}:{_ARRANGEMENTS[chip]}")[0]

    def predict(job: Job) -> Result:
        schedules.clear(folder)
        operands = jax.eval_shape(lambda: job.tunable.operands(job.case, jax.random.key(0)))
        try:
            compiled = topologies.compile_for(
                device, lambda operands: job.tunable.run(operands, job.tiles), operands
            )
            executed = _executed(job, chip, folder)
        except (jax.errors.JaxRuntimeError, ConfigError) as error:
            return Result(job, None, _reason(error))
        flops, moved = _work(job, compiled)
        predicted = schedules.predict(
            executed,
            schedules.CLOCKS[chip],
            costs.CHIPS[chip],
            flops=flops,
            moved_bytes=moved,
        )
        remark = f"{predicted.limit}; {executed:,.0f} bundles a core"
        return Result(job, predicted.seconds, remark, executed)

    return predict


def _executed(job: Job, chip: str, folder: pathlib.Path) -> float:
    """Sums the bundles of all kernels of a job."""
    found = schedules.read_folder(folder)
    known = job.tunable.frequencies(job.case, chip, job.tiles)
    require(
        found.keys() == known.keys(),
        f"kernels {sorted(found)} were compiled, and frequencies are given for {sorted(known)}; "
        "name in TUNABLE those that run",
    )
    return sum(schedules.bundles(found[name], known[name]) for name in found)


def _work(job: Job, compiled: Any) -> tuple[float, float]:
    """Returns operations, and bytes of main memory."""
    if job.tunable.cost is not None:
        cost = job.tunable.cost(job.case, job.tiles)
        return cost.flops, cost.bytes
    counted = compiled.cost_analysis()
    return counted["flops"], counted["bytes accessed"]


def _timer() -> Callable[[Job], Result]:
    """Returns what runs a job on the device that is there."""
    import jax

    def run(job: Job) -> Result:
        operands = jax.jit(lambda: job.tunable.operands(job.case, jax.random.key(0)))()
        call = jax.jit(lambda operands: job.tunable.run(operands, job.tiles))
        try:
            jax.block_until_ready(call(operands))
        except jax.errors.JaxRuntimeError as error:
            return Result(job, None, _reason(error))
        start = time.perf_counter()
        for _ in range(_TIMED_CALLS):
            result = call(operands)
        jax.block_until_ready(result)
        return Result(job, (time.perf_counter() - start) / _TIMED_CALLS, "timed")

    return run


def _reason(error: Exception) -> str:
    """Returns an error as one line."""
    return " ".join(str(error).split())[:_REASON]


def _shown(tiles: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in tiles.items())


def _by_case(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Groups results by kernel and case, the fastest first and the failures last."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.job.kernel, result.job.name), []).append(result)
    for group in groups.values():
        group.sort(key=lambda r: (float("inf") if r.seconds is None else r.seconds, r.bundles))
    return groups


def _print(results: list[Result], chip: str, console: Console) -> None:
    timed = chip in topologies.GPU_KINDS
    note = "timed" if timed else "predicted from the schedule: a ranking, not a measurement"
    table = Table(title=f"{chip}, {note}")
    for heading in ("kernel", "case", "tiles", "microseconds", "limited by"):
        table.add_column(heading, justify="right" if heading == "microseconds" else "left")
    for (kernel, name), group in _by_case(results).items():
        for result in [r for r in group if r.seconds is not None][: _SHOWN.value]:
            value = f"{result.seconds * _MICRO:.1f}"
            table.add_row(kernel, name, _shown(result.job.tiles), value, result.remark)
    console.print(table)


def _found(results: list[Result]) -> list[Entry]:
    """Returns the best of each case as an entry of the table."""
    best = [group[0] for group in _by_case(results).values()]
    return [
        {
            "kernel": result.job.kernel,
            "shape": result.job.tunable.shape(result.job.case),
            "tiles": result.job.tiles,
            "microseconds": round(result.seconds * _MICRO, 1),
            "how": "timed" if _CHIP.value in topologies.GPU_KINDS else "schedule",
        }
        for result in best
        if result.seconds is not None and result.job.tunable.is_tabulated
    ]


def _write(found: list[Entry], file: pathlib.Path) -> list[Entry]:
    """Puts what was found into the table, and returns what did not get there."""
    old = json.loads(file.read_text()) if file.is_file() else []
    entries = merge(old, found, replace=_REPLACE.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_text(entries))
    return [entry for entry in found if entry not in entries]


if __name__ == "__main__":
    app.run(main)
