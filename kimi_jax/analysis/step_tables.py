"""Prints a step's report as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30
_MOST_ROWS = 30
_LEAST_SHARE = 0.002  # of the time, below which a part of the program is not listed


def print_tables(report: dict[str, Any], console: Console) -> None:
    """Prints what `step_report` returns, with the compilation's own figures."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    slices = f" x {report['num_slices']} slices" if report["num_slices"] > 1 else ""
    console.print(f"{report['topology']}{slices}: {report['devices']} devices, mesh {mesh}")
    for table in (
        _memory(report["memory"]),
        _buffers(report["buffers"]),
        _collectives(report["collectives"]),
        _flops(report["flops"]),
        _scopes(report["scopes"]),
        _time(report["time"]),
    ):
        console.print(table)
    for loop, count in report["unknown_loops"].items():
        console.print(f"counted as one trip, its length depends on data ({count} loops): {loop}")
    for target, runs in report["unknown_custom_calls"].items():
        console.print(f"counted as nothing, its cost is not stated ({runs:.0f} runs): {target}")
    console.print("Assumed: " + "; ".join(report["assumptions"]) + ".")
    tool = report["tool"]
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in tool["seconds"].items())
    console.print(f"{took}; peak memory of this process {_gib(tool['peak_rss_bytes'])} GiB")


def _memory(memory: dict[str, float]) -> Table:
    table = _table("Memory per device", "", "GiB", "of the chip")
    for name, size in memory.items():
        table.add_row(name.replace("_", " "), _gib(size), f"{size / memory['chip']:.1%}")
    return table


def _buffers(buffers: list[dict[str, Any]]) -> Table:
    table = _table("Temporaries where they are the most", "", "GiB", "shape")
    for buffer in buffers:
        name = buffer["operation_name"] or buffer["name"]
        table.add_row(name, _gib(buffer["bytes"]), buffer["shape"])
    return table


def _collectives(collectives: list[dict[str, Any]]) -> Table:
    table = _table("Communication per device and step", "", "axes", "runs", "GB sent", "ms")
    for one in collectives:
        table.add_row(
            one["kind"],
            " x ".join(one["axes"]),
            f"{one['count']:.0f}",
            f"{one['bytes'] / 1e9:.3f}",
            f"{1e3 * one['seconds']:.2f}",
        )
    return table


def _flops(flops: dict[str, dict[str, float]]) -> Table:
    table = _table("TFLOP per device and step", "", "counted", "closed form", "ratio")
    for kind, row in flops.items():
        counted, closed = row["counted"], row["closed_form"]
        ratio = f"{counted / closed:.3f}" if closed else "-"
        table.add_row(kind, f"{counted / 1e12:.4g}", f"{closed / 1e12:.4g}", ratio)
    return table


def _scopes(scopes: list[dict[str, Any]]) -> Table:
    columns = ("phase", "TFLOP", "GB memory", "GB sent", "compute ms", "memory ms", "network ms")
    table = _table("Where the time goes", "", *columns)
    total = sum(row["seconds"] for row in scopes)
    for row in scopes[:_MOST_ROWS]:
        if row["seconds"] < _LEAST_SHARE * total:
            break
        table.add_row(
            row["scope"],
            row["phase"],
            f"{row['flops'] / 1e12:.3g}",
            f"{row['bytes'] / 1e9:.3g}",
            f"{row['sent'] / 1e9:.3g}",
            *(f"{1e3 * row[f'{name}_seconds']:.2f}" for name in ("compute", "memory", "network")),
        )
    return table


def _time(time: dict[str, Any]) -> Table:
    table = _table("Predicted step", "", "seconds", "MFU")
    for name in ("compute", "memory", "network"):
        table.add_row(name, f"{time[f'{name}_seconds']:.4g}", "")
    table.add_row(
        f"all overlapping ({time['limit']})", f"{time['step_seconds']:.4g}", f"{time['mfu']:.1%}"
    )
    one_by_one = time["step_seconds_one_by_one"]
    table.add_row("scopes one by one", f"{one_by_one:.4g}", f"{time['mfu_one_by_one']:.1%}")
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _gib(size: float) -> str:
    return f"{size / _GIB:.3f}"
