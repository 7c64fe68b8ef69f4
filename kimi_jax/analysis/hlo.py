"""Reads the text of a compiled program (optimised HLO) into computations of instructions.

One instruction of the text:

    %name = bf16[8,128]{1,0:T(8,128)S(1)} fusion(%a, %b), kind=kLoop, calls=%c, metadata={...}
"""

import dataclasses
import functools
import math
import re

# Bits of one value. Types that are not here (token, opaque) hold no data.
_BITS = {
    "pred": 8,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_ARRAY = re.compile(r"(?P<type>[a-z]\w*)\[(?P<dims>[\d,<= ?]*)\](?P<layout>\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_OPERATION_NAME = re.compile(r'op_name="([^"]*)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_COMMENT = re.compile(r"/\*.*?\*/")

# In layouts of the TPU compiler, memory that is not the chip's main memory, by number.
_MAIN_MEMORY = 0
HOST_MEMORY = 5


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array.

    Attributes:
      type: such as bf16.
      dims: sizes.
      space: 0 for the main memory; other numbers are memories on the chip, or 5, the host's.
    """

    type: str
    dims: tuple[int, ...]
    space: int = _MAIN_MEMORY

    @property
    def bytes(self) -> int:
        """Size without the padding that a tiled layout adds."""
        return -(-math.prod(self.dims) * bits_of(self.type) // 8)

    @property
    def main_memory_bytes(self) -> int:
        """Size, or 0 where the array is not in the main memory."""
        return self.bytes if self.space == _MAIN_MEMORY else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: such as fusion.
      arrays: the results; several where the result is a tuple.
      operands: names of the arguments.
      arguments: text between the parentheses.
      attributes: text behind them.
      is_root: it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operation_name(self) -> str:
        """Path of named scopes and primitive that JAX gave to the operation; may be empty."""
        match = _OPERATION_NAME.search(self.attributes)
        return match.group(1) if match else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that run as part of this instruction, without conditions."""
        branches = _BRANCHES.search(self.attributes)
        if branches:
            return tuple(name.strip().lstrip("%") for name in branches.group(1).split(","))
        return tuple(_TRUE_FALSE.findall(self.attributes) or _CALLED.findall(self.attributes))

    def attribute(self, name: str) -> str:
        """Returns the text of an attribute's value in braces, or its bare word; empty if absent."""
        match = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes)
        return (match.group(1) or match.group(2) or "") if match else ""

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns the integers of an attribute like `dimensions={0,1}`."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Computation:
    """A sequence of instructions: the entry, the body of a loop, or what a fusion computes."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        instructions = list(self.instructions.values())
        return next((i for i in instructions if i.is_root), instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The arguments by position."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.arguments): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a value, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Module:
    """All computations of a compiled program.

    Attributes:
      computations: by name.
      entry: the one that runs first.
      num_partitions: devices that the program is written for; those of one slice where there are
        several.
    """

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int


def bits_of(type_name: str) -> int:
    """Returns the bits of one value; 0 for types that hold no data."""
    if type_name.startswith("f8"):
        return 8
    return 4 if type_name.startswith("f4") else _BITS.get(type_name, 0)


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text()` returns, of any platform.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = {}, None
    instructions = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            instructions = {}
            computation = Computation(header["name"], instructions)
            computations[computation.name] = computation
            entry = computation if header["entry"] else entry
        elif instructions is not None and _NAME.match(line):
            instruction = _parse_instruction(line)
            instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    partitions = _PARTITIONS.search(text.partition("\n\n")[0])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Reads all array shapes of a type, which may be a nested tuple, from left to right."""
    arrays = []
    for match in _ARRAY.finditer(text):
        space = _SPACE.search(match["layout"] or "")
        dims = tuple(int(size) for size in re.findall(r"\d+", match["dims"]))
        arrays.append(Array(match["type"], dims, int(space.group(1)) if space else _MAIN_MEMORY))
    return tuple(arrays)


def _parse_instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line)
    name = _NAME.match(line)
    rest = line[name.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    start = call.index("(")
    stop = _closing(call, start)
    arguments = call[start + 1 : stop]
    return Instruction(
        name=name["name"],
        opcode=call[:start],
        arrays=parse_arrays(shape),
        operands=tuple(_OPERAND.findall(arguments)),
        arguments=arguments,
        attributes=call[stop + 1 :],
        is_root=bool(name["root"]),
    )


def _closing(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place.group() == "(" else -1
        if depth == 0:
            return start + place.start()
    raise ValueError(f"unbalanced parentheses in the compiled program: {text[:80]}")
