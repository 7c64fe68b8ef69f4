"""Works out integers of a compiled program before it runs: loop bounds, indices, device numbers.

Only what follows from constants, from the number of the device and from the iteration of enclosing
loops is known; everything that depends on data is `None`.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kimi_jax.analysis.hlo import Computation, Instruction, Module

_LARGEST_ARRAY = 4096  # values; larger arrays are data, not indices
_MOST_TRIPS = 2**31
_NUMBER = re.compile(r"true|false|-?\d+")
_SAME = frozenset(
    {"bitcast", "reshape", "copy", "copy-start", "copy-done", "convert", "optimization-barrier"}
)
_COMPARISONS = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: np.sign(a) * np.sign(b) * (abs(a) // np.maximum(abs(b), 1)),
    "remainder": lambda a, b: np.sign(a) * (abs(a) % np.maximum(abs(b), 1)),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "negate": operator.neg,
    "abs": abs,
    "sign": np.sign,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": np.logical_not,
    "select": lambda which, a, b: np.where(which, a, b),
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
    "shift-right-arithmetic": operator.rshift,
}

Value = np.ndarray | None


class Frame:
    """One run of a computation, whose values are worked out when asked for.

    Attributes:
      computation: what runs.
      device: number of the device that runs it.
    """

    def __init__(
        self,
        module: Module,
        computation: Computation,
        device: int,
        argument: Callable[[int, int | None], Value],
    ):
        """Prepares a run; `argument(number, element)` tells the arguments' values."""
        self._module = module
        self.computation = computation
        self.device = device
        self._argument = argument
        self._known: dict[tuple[str, int | None], Value] = {}

    def value(self, name: str, element: int | None = None) -> Value:
        """Returns an instruction's value, of a tuple one element; None if it is not known."""
        key = (name, element)
        if key not in self._known:
            self._known[key] = None  # of a value that depends on itself
            self._known[key] = self._compute(self.computation.instructions[name], element)
        return self._known[key]

    def result(self, element: int | None = None) -> Value:
        """Returns the value of the computation."""
        return self.value(self.computation.root.name, element)

    def call(self, instruction: Instruction, name: str) -> "Frame":
        """Returns the run of a computation that `instruction` calls with its own operands."""

        def argument(number: int, element: int | None) -> Value:
            return self.value(instruction.operands[number], element)

        return Frame(self._module, self._module.computations[name], self.device, argument)

    def body(self, loop: Instruction, bound: dict[int, Value] | None = None) -> "Frame":
        """Returns one iteration of a while loop.

        Args:
          loop: the instruction.
          bound: elements of the loop's state whose values in this iteration are known; elements
            that the loop passes on unchanged are known where they were before it.
        """
        return self._iteration(loop, loop.called[0], bound or {})

    def iterations(self, loop: Instruction) -> tuple[int, int, int] | None:
        """Returns place, first value and step of a loop's counter; None if not known."""
        counter = self._counter(loop)
        if counter is None:
            return None
        place, first = counter
        second = self._iteration(loop, loop.called[0], {place: first}).result(place)
        return None if second is None else (place, int(first), int(second - first))

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a while loop runs; None if that is not known.

        The condition is tried at n steps of the counter for growing n, so that its form does not
        matter.
        """
        counter = self.iterations(loop)
        if counter is None:
            return None
        place, first, step = counter

        def goes_on(trips: int) -> bool:
            at = {place: np.asarray(first + trips * step)}
            return bool(self._iteration(loop, _condition(loop), at).result())

        if not goes_on(0):
            return 0
        if step == 0:
            return None
        high = 1
        while goes_on(high):
            high *= 2
            if high > _MOST_TRIPS:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if goes_on(middle) else (low, middle)
        return high

    def _counter(self, loop: Instruction) -> tuple[int, Value] | None:
        """Finds the element of the state that alone decides the condition at the start."""
        for place, array in enumerate(loop.arrays):
            if array.dims or array.type not in ("s32", "u32", "s64", "u64"):
                continue
            first = self.value(loop.operands[0], place)
            if first is None or self._passes_on(loop, place):
                continue
            if self._iteration(loop, _condition(loop), {place: first}).result() is not None:
                return place, first
        return None

    def _iteration(self, loop: Instruction, name: str, bound: dict[int, Value]) -> "Frame":
        def argument(number: int, element: int | None) -> Value:
            del number
            if element in bound:
                return bound[element]
            if element is not None and self._passes_on(loop, element):
                return self.value(loop.operands[0], element)
            return None

        return Frame(self._module, self._module.computations[name], self.device, argument)

    def _passes_on(self, loop: Instruction, place: int) -> bool:
        body = self._module.computations[loop.called[0]]
        if body.root.opcode != "tuple":
            return False
        source = body.instructions[body.root.operands[place]]
        while source.opcode in _SAME:
            source = body.instructions[source.operands[0]]
        return (
            source.opcode == "get-tuple-element"
            and source.integers("index") == (place,)
            and body.instructions[source.operands[0]].opcode == "parameter"
        )

    def _compute(self, instruction: Instruction, element: int | None) -> Value:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self._argument(int(instruction.arguments), element)
        if opcode == "tuple":
            return None if element is None else self.value(operands[element])
        if opcode == "get-tuple-element":
            return self.value(operands[0], instruction.integers("index")[0])
        if opcode in ("fusion", "call"):
            return self.call(instruction, instruction.called[0]).result(element)
        if opcode == "while":
            passed = element is not None and self._passes_on(instruction, element)
            return self.value(operands[0], element) if passed else None
        array = instruction.arrays[0] if instruction.arrays else None
        if array is None or array.type[0] not in "sup" or np.prod(array.dims) > _LARGEST_ARRAY:
            return None
        if not operands:
            return self._source(instruction)
        values = [self.value(operand) for operand in operands]
        if any(value is None for value in values):
            return None
        return _apply(instruction, values)

    def _source(self, instruction: Instruction) -> Value:
        """Returns the value of an instruction without arguments."""
        slice_number, number = divmod(self.device, self._module.num_partitions)
        if instruction.opcode == "constant":
            return _constant(instruction)
        if instruction.opcode == "partition-id":
            return np.asarray(number)
        if "SliceId" in instruction.attributes:
            return np.asarray(slice_number)
        return np.asarray(0) if instruction.opcode == "replica-id" else None


def entry_frame(module: Module, device: int) -> Frame:
    """Returns the run of the whole program on one device; its arguments are data, not known."""
    return Frame(module, module.entry, device, lambda number, element: None)


def _condition(loop: Instruction) -> str:
    return loop.attribute("condition").lstrip("%")


def _constant(instruction: Instruction) -> Value:
    words = _NUMBER.findall(instruction.arguments)
    numbers = [word == "true" if word in ("true", "false") else int(word) for word in words]
    dims = instruction.arrays[0].dims
    if len(numbers) != np.prod(dims):
        return None  # the text leaves long constants out
    return np.asarray(numbers).reshape(dims)


def _apply(instruction: Instruction, values: list[np.ndarray]) -> Value:
    opcode, dims = instruction.opcode, instruction.arrays[0].dims
    if opcode in _SAME:
        return np.reshape(values[0], dims)
    if opcode in _ARITHMETIC:
        return np.asarray(_ARITHMETIC[opcode](*values))
    if opcode == "compare":
        return np.asarray(_COMPARISONS[instruction.attribute("direction")](*values))
    if opcode == "broadcast" and values[0].ndim == 0:
        return np.broadcast_to(values[0], dims)
    if opcode == "dynamic-slice":
        starts = [
            int(np.clip(start, 0, size - width))
            for start, size, width in zip(values[1:], values[0].shape, dims, strict=True)
        ]
        return values[0][tuple(slice(s, s + width) for s, width in zip(starts, dims, strict=True))]
    return None
