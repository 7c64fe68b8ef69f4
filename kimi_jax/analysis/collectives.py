"""Collectives of a compiled program: what they move, and along which mesh axes."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from kimi_jax.analysis.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:T\(([\d,]+)\))? ?\{([^}]*)\}")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_AXIS_SIZE = re.compile(r"'([^']+)'=(\d+)")
_AXIS_NAME = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes along which the devices of one group lie.
      groups: device numbers [groups, devices of a group].
      bytes: what one device sends.
    """

    kind: str
    axes: tuple[str, ...]
    groups: np.ndarray
    bytes: float


def collective(
    instruction: Instruction,
    computation: Computation,
    axis_sizes: Mapping[str, int],
    num_partitions: int,
) -> Collective | None:
    """Reads an instruction as a collective.

    Where there are several slices, a program is one slice's: what it exchanges with the others, it
    sends to the host, and the rest happens among its own devices.

    A device of a group of g sends, by rings, (g-1)/g of the gathered, scattered or exchanged array,
    twice that for an all-reduce, and all of its array for a permutation. A ragged exchange counts
    as a full one: its traffic depends on data.

    Args:
      instruction: any.
      computation: the one it is in.
      axis_sizes: the mesh, whose devices are numbered row by row, slice by slice.
      num_partitions: devices of a slice.

    Returns:
      None for what is no collective, for the end of an asynchronous one, and for one among single
      devices.
    """
    kind = instruction.opcode.removesuffix("-start")
    between_slices = _BETWEEN_SLICES.search(instruction.attributes) if kind == "send" else None
    if between_slices:
        kind = between_slices.group(1).lower().replace("_", "-")
        slices = math.prod(axis_sizes.values()) // num_partitions
        groups = np.arange(slices * num_partitions).reshape(slices, num_partitions).T
    elif kind in KINDS:
        groups = _groups(instruction, num_partitions)
    else:
        return None
    size = groups.shape[1]
    if size == 1:
        return None
    operands = [computation.instructions[name] for name in instruction.operands]
    if kind == "ragged-all-to-all":
        operands = operands[:1]
    sent = float(sum(array.bytes for operand in operands for array in operand.arrays))
    if kind == "all-gather":
        sent *= size - 1
    elif kind == "all-reduce" and _is_scattered(instruction, computation):
        kind = "reduce-scatter"
        sent *= (size - 1) / size
    elif kind == "all-reduce":
        sent *= 2 * (size - 1) / size
    elif kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        sent *= (size - 1) / size
    return Collective(kind, axes_of(groups, axis_sizes), groups, sent)


def axes_of(groups: np.ndarray, axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names the mesh axes along which the devices of a group differ.

    Args:
      groups: device numbers [groups, devices of a group].
      axis_sizes: the mesh, whose devices are numbered row by row.
    """
    places = np.unravel_index(groups, tuple(axis_sizes.values()))
    return tuple(
        name
        for name, place in zip(axis_sizes, places, strict=True)
        if np.any(place != place[:, :1])
    )


def parse_groups(text: str, num_devices: int) -> np.ndarray:
    """Reads replica groups in any of the three forms of the compiler's texts.

    `{{0,1},{2,3}}`; `[2,2]<=[4]`, numbers reshaped, transposed and reshaped; and `mesh['a'=2,'b'=2]
    {'b'}`. Empty groups mean all devices.

    Returns:
      Device numbers [groups, devices of a group].
    """
    mesh = _MESH.match(text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = _IOTA.match(text)
    if iota:
        shape, source = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        numbers = np.arange(math.prod(source)).reshape(source)
        if iota.group(3):
            numbers = numbers.transpose(tuple(map(int, iota.group(3).split(","))))
        return numbers.reshape(shape)
    groups = re.findall(r"\{([\d,]+)\}", text)
    if not groups:
        return np.arange(num_devices)[None]
    return np.asarray([[int(number) for number in group.split(",")] for group in groups])


def _mesh_groups(sizes: str, order: str | None, names: str) -> np.ndarray:
    axes = [(name, int(size)) for name, size in _AXIS_SIZE.findall(sizes)]
    shape = tuple(size for _, size in axes)
    if order is None:
        numbers = np.arange(math.prod(shape)).reshape(shape)
    else:
        permutation = tuple(map(int, order.split(",")))
        source = np.empty(len(shape), int)
        source[list(permutation)] = shape
        numbers = np.arange(math.prod(shape)).reshape(source).transpose(permutation)
    dims, kept, moved = [], [], []
    wanted = {name: (pre, size) for name, pre, size in _AXIS_NAME.findall(names)}
    for name, size in axes:
        pre, part = wanted.get(name, ("", ""))
        parts = (int(pre), int(part), size // (int(pre) * int(part))) if pre else (1, size, 1)
        for number, length in enumerate(parts):
            (moved if name in wanted and number == 1 else kept).append(len(dims))
            dims.append(length)
    group = math.prod(dims[dim] for dim in moved)
    return numbers.reshape(dims).transpose(kept + moved).reshape(-1, group)


def _groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    name = (
        "source_target_pairs"
        if instruction.opcode.startswith("collective-permute")
        else "replica_groups"
    )
    _, _, text = instruction.attributes.partition(f"{name}=")
    if text.startswith("{{"):
        text = text[: text.index("}}") + 2]
    elif text.startswith("{"):
        text = "{}"
    groups = parse_groups(text, num_devices)
    if name == "source_target_pairs":
        groups = groups[groups[:, 0] != groups[:, 1]]  # what stays is no traffic
        return groups if len(groups) else np.zeros((1, 1), int)
    return groups


def _is_scattered(instruction: Instruction, computation: Computation) -> bool:
    """True for an all-reduce of which a fusion keeps this device's part only."""
    return computation.name.startswith("all-reduce-scatter")
