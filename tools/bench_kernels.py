"""Checks and times every kernel on whatever device there is, beside XLA's and tokamax's programs.

    python tools/bench_kernels.py                       everything, in less than eight minutes
    python tools/bench_kernels.py --only=int4_matmul    kernels whose name contains the text
    python tools/bench_kernels.py --json=kernels.json   keeps the figures

First every small case of every implementation that runs here is compared with the reference; then
Kimi K2's shapes (on a CPU: small ones) are timed, forward, and with gradients where training needs
them. A program calls the kernel on several copies of its operands, so that neither a cache nor the
time to launch it hides what it costs. The share of the roofline is
max(operations / peak, bytes / bandwidth) / time, of the work that has to be done at least.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from kernel_registry import KERNELS, TOKAMAX, Kernel, Program
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import program
from kimi_jax.analysis.costs import CHIPS
from kimi_jax.configs.compute import Implementation
from kimi_jax.core.errors import KimiError, require
from kimi_jax.core.platform import target_chip, target_platform
from kimi_jax.kernels.cost import Cost

_ONLY = flags.DEFINE_string("only", "", "measure kernels whose name contains this")
_JSON = flags.DEFINE_string("json", None, "file to write the figures to")

# bfloat16 keeps 8 bits, and operands, intermediate values and results are rounded to it.
_TOLERANCE = 2e-2
_COPIED_BYTES = 2**28  # more than any cache holds
_MOST_COPIES = 16
_RUNS, _SECONDS = 20, 0.5  # of each timing, at most
_NOT_MEASURED = (Implementation.AUTO, Implementation.REFERENCE)
_GRADIENT_FLOPS = 3  # forward and backward, as a multiple of forward
_FILE_WIDTH = 120  # of tables that go to no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One line: a program for one case."""

    kernel: str
    case: str
    gradient: bool
    by: str  # whose program
    run: Program
    operands: dict[str, Any]
    cost: Cost

    @property
    def copies(self) -> int:
        """Calls in one program."""
        return int(np.clip(_COPIED_BYTES // self.cost.bytes, 1, _MOST_COPIES))


def main() -> None:
    """Checks, times, prints, and fails if a check does."""
    kernels = {name: kernel for name, kernel in KERNELS.items() if _ONLY.value in name}
    require(kernels, f"no kernel is named like {_ONLY.value!r}; there are {', '.join(KERNELS)}")
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    if not _installed(TOKAMAX):
        console.print(f"{TOKAMAX} is not installed: its programs are not measured")
    checks = [row for name, kernel in kernels.items() for row in check(name, kernel)]
    _print(console, "largest error, as a share of the largest value", checks)
    lines = [line for name, kernel in kernels.items() for line in measurements(name, kernel)]
    results = measure(lines, console)
    _print(console, "time of a call", results)
    if _JSON.value:
        found = {"device": jax.devices()[0].device_kind, "checks": checks, "times": results}
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    wrong = [row for row in checks if not row["right"]]
    if wrong:
        raise KimiError(f"{len(wrong)} of {len(checks)} results are wrong, see the first table")


def implementations(kernel: Kernel, operands: dict[str, Any]) -> list[Implementation]:
    """Lists those that run on this device; others raise while they are traced.

    What XLA is given for CPUs, loops over small blocks, is left out where there is a program for
    accelerators: at K2's shapes it would take most of the time.
    """
    found = [i for i in Implementation if i not in _NOT_MEASURED and _runs(kernel, i, operands)]
    if target_platform() != "cpu" and Implementation.XLA_ACCELERATOR in found:
        found.remove(Implementation.XLA)
    return found


def _runs(kernel: Kernel, implementation: Implementation, operands: dict[str, Any]) -> bool:
    try:
        jax.eval_shape(_bind(kernel, implementation), operands)
    except NotImplementedError:
        return False
    return True


def check(name: str, kernel: Kernel) -> Iterator[dict[str, Any]]:
    """Compares each implementation with the reference on each small case."""
    for case_name, case in kernel.cases.TOY.items():
        operands = kernel.cases.operands(case, jax.random.key(0))
        for gradient in _passes(kernel):
            expected = _call(kernel, Implementation.REFERENCE, gradient, operands)
            for implementation in implementations(kernel, operands):
                found = _call(kernel, implementation, gradient, operands)
                error = max(map(_error, jax.tree.leaves(found), jax.tree.leaves(expected)))
                yield {
                    "kernel": name,
                    "case": case_name,
                    "pass": _pass(gradient),
                    "by": implementation.value,
                    "error": error,
                    "right": error <= _TOLERANCE,
                }


def measurements(name: str, kernel: Kernel) -> Iterator[Measurement]:
    """Lists what is timed of a kernel on this device."""
    small = target_platform() == "cpu"
    for case_name, case in (kernel.cases.TOY if small else kernel.cases.KIMI_K2).items():
        operands = jax.jit(functools.partial(kernel.cases.operands, case))(jax.random.key(0))
        cost = kernel.cases.cost(case)
        programs = {
            implementation.value: _bind(kernel, implementation)
            for implementation in implementations(kernel, operands)
        }
        for other, run in kernel.baselines.items():
            if other != TOKAMAX or _installed(TOKAMAX):
                programs[other] = functools.partial(_by_name, run, dict(kernel.fixed))
        for gradient, (by, run) in itertools.product(_passes(kernel), programs.items()):
            factor = _GRADIENT_FLOPS if gradient else 1
            yield Measurement(
                kernel=name,
                case=case_name,
                gradient=gradient,
                by=by,
                run=_with_gradient(kernel, run) if gradient else run,
                operands=operands,
                cost=Cost(factor * cost.flops, factor * cost.bytes),
            )


def measure(lines: list[Measurement], console: Console) -> list[dict[str, Any]]:
    """Compiles on all cores, then times one program after the other."""
    results = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = progress.add_task("compiling, timing", total=len(lines))
        compiled = [pool.submit(_compile, line) for line in lines]
        for line, program_ in zip(lines, compiled, strict=True):
            results.append(_result(line, program_))
            progress.advance(task)
    return results


def _compile(line: Measurement) -> Any:
    def many(copies):
        return [line.run(operands) for operands in copies]

    return jax.jit(many).lower([line.operands] * line.copies).compile()


def _result(line: Measurement, compiling: concurrent.futures.Future) -> dict[str, Any]:
    row = {
        "kernel": line.kernel,
        "case": line.case,
        "pass": _pass(line.gradient),
        "by": line.by,
    }
    try:
        seconds = _fastest(compiling.result(), line)
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        # Another project's program may not run these shapes: that is a result, too.
        return row | {"failed": str(error).splitlines()[0][:100]}
    row |= {"microseconds": 1e6 * seconds, "tflops": line.cost.flops / seconds / 1e12}
    row["gb_per_second"] = line.cost.bytes / seconds / 1e9
    chip = CHIPS.get(target_chip() or "")
    if chip is not None:
        least = max(line.cost.flops / chip.flops, line.cost.bytes / chip.memory_bandwidth)
        row["share_of_roofline"] = least / seconds
    return row


def _fastest(compiled: Any, line: Measurement) -> float:
    """Seconds of one call, the best of several runs."""
    copies = [jax.tree.map(jnp.copy, line.operands) for _ in range(line.copies)]
    jax.block_until_ready(compiled(copies))
    best, end = np.inf, time.perf_counter() + _SECONDS
    for _ in range(_RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(copies))
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return best / line.copies


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _by_name(run: Program, fixed: dict[str, Any], operands: dict[str, Any]) -> Any:
    return run(**operands, **fixed)


def _bind(kernel: Kernel, implementation: Implementation) -> Program:
    fixed = dict(kernel.fixed) | {"implementation": implementation}
    return functools.partial(_by_name, kernel.run, fixed)


def _with_gradient(kernel: Kernel, run: Program) -> Program:
    """Returns a program of the result and the gradients of all differentiated arrays."""

    def both(operands: dict[str, Any]) -> Any:
        arrays = {
            name: operands[name]
            for name in kernel.differentiated
            if isinstance(operands[name], jax.Array)
        }
        value, pull_back = jax.vjp(lambda arrays: run(operands | arrays), arrays)
        return value, pull_back(jax.tree.map(jnp.ones_like, value))

    return both


def _call(
    kernel: Kernel, implementation: Implementation, gradient: bool, operands: dict[str, Any]
) -> Any:
    run = _bind(kernel, implementation)
    return jax.jit(_with_gradient(kernel, run) if gradient else run)(operands)


def _passes(kernel: Kernel) -> tuple[bool, ...]:
    return (False, True) if kernel.differentiated else (False,)


def _pass(gradient: bool) -> str:
    return "with gradients" if gradient else "forward"


def _error(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    largest = max(np.max(np.abs(expected), initial=0.0), 1e-3)
    return float(np.max(np.abs(found - expected), initial=0.0) / largest)


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a table for each kernel."""
    for kernel, of_kernel in itertools.groupby(rows, key=lambda row: row["kernel"]):
        of_kernel = list(of_kernel)
        names = [name for name in dict.fromkeys(itertools.chain(*of_kernel)) if name != "kernel"]
        table = Table(*names, title=f"{kernel}: {title}")
        for row in of_kernel:
            table.add_row(*(_cell(row.get(name, "")) for name in names))
        console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    program.run(main)
