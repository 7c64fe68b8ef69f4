"""Reads what a compiled program does out of its text."""

import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def largest_result(text: str, name: str) -> int:
    """Values in the largest result of the operations called `name`; 0 without any."""
    sizes = [
        math.prod(shape)
        for operations in _computations(text)[0].values()
        for _, result, kind, _ in operations
        if kind in (name, f"{name}-start")
        for shape in _shapes(result)
    ]
    return max(sizes, default=0)


def dot_flops(text: str) -> int:
    """FLOPs of all dots that one device runs, those in loops as often as the loop runs.

    Raises:
      AssertionError: how often a loop with dots runs is not known from the program.
    """
    computations, entry = _computations(text)

    def count(computation: str) -> int:
        operations = computations[computation]
        shapes = {name: _shapes(result) for name, result, _, _ in operations}
        total = 0
        for name, _, kind, rest in operations:
            if kind == "dot":
                total += _flops_of_dot(shapes[name][0], rest, shapes)
            inner = sum(map(count, _called(rest)))
            if kind == "while" and inner:
                trips = _TRIP_COUNT.search(rest)
                assert trips is not None, f"unknown trip count: {name}"
                inner *= int(trips[1])
            total += inner
        return total

    return count(entry)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Lists (name, result, kind, rest) of each computation's operations; names the entry."""
    computations, entry, operations = {}, "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            operations = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif operation := _OPERATION.match(line):
            operations.append(operation.groups())
    return computations, entry


def _called(rest: str) -> list[str]:
    return [name.strip(" %") for names in _CALLED.findall(rest) for name in names.split(",")]


def _shapes(result: str) -> list[tuple[int, ...]]:
    """Shapes of an array, or of each array of a tuple: `(f32[2,3]{1,0}, s32[])`."""
    return [
        tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\[([\d,]*)\]", result)
    ]


def _flops_of_dot(result: tuple[int, ...], rest: str, shapes: dict) -> int:
    left = re.search(r"%([\w.\-]+)", rest)[1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    depth = math.prod(shapes[left][0][int(dim)] for dim in contracted.split(","))
    return 2 * math.prod(result) * depth
