"""Floating-point operations and memory traffic of single instructions of a compiled program."""

import functools
import json
import math
import re

from kimi_jax.analysis.hlo import Array, Computation, Instruction, Module

# Instructions that move nothing: names for values, control flow (its body counts), and the ends of
# transfers whose beginnings count.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "call-start",
        "call-done",
        "call-update",
        "async-start",
        "async-update",
        "async-done",
        "after-all",
        "partition-id",
        "replica-id",
        "optimization-barrier",
        "add-dependency",
        "domain",
        "get-dimension-size",
        "iota",
    }
)
# Custom calls that are no arithmetic.
_FREE_TARGETS = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "GatherScatterIndicesBitpacked",
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "MoveToHost",
        "MoveToDevice",
        "TopK",
        "PartialReduce",
        "X64SplitLow",
        "X64SplitHigh",
        "X64Combine",
        "CreateToken",
        "ZeroCrop",
    }
)
_VIEWS = frozenset({"bitcast", "reshape", "convert", "copy"})
_SIZES = re.compile(r"\b(\w+)=([\d_x\-]+)")


def flops(instruction: Instruction, computation: Computation) -> float | None:
    """Counts an instruction's own operations in matrix products, not those of what it calls.

    Returns:
      2 M N K for products, 0 for everything else, and None for a custom call whose cost neither
      the compiler nor whoever wrote it has stated.
    """
    opcode = instruction.opcode
    if opcode == "dot":
        return 2.0 * _values(instruction) * _contracted(instruction, computation)
    if opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if opcode == "ragged-dot":
        return _ragged_dot_flops(instruction, computation)
    if opcode == "custom-call":
        return _custom_call_flops(instruction, computation)
    return 0.0


def is_free_custom_call(instruction: Instruction) -> bool:
    """True for custom calls that compute nothing."""
    if instruction.attribute("custom_call_target").strip('"') in _FREE_TARGETS:
        return True
    # Such as the tables that the TPU compiler's ragged products start with: indices, no products.
    return all(array.type[0] in "sup" for array in instruction.arrays)


def main_memory_bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Counts the bytes that an instruction reads from and writes to the main memory.

    Operands and results that the compiler keeps on the chip cost nothing. Where only a part of an
    array is read (a slice, gathered rows) or written in place (an update), only that part counts.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and is_free_custom_call(instruction):
        return 0  # it computes a view or a few indices
    if opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        reads = sum(
            min(_read_bytes(fused, parameter, module), _operand_bytes(operand, computation))
            for operand, parameter in zip(
                instruction.operands, _parameters_in_order(fused), strict=True
            )
        )
        return reads + _written_bytes(fused, instruction)
    written = sum(array.main_memory_bytes for array in instruction.arrays)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * _operand_bytes(instruction.operands[1], computation)
    if opcode == "scatter":
        return 3 * _operand_bytes(instruction.operands[-1], computation)
    reads = sum(_operand_bytes(operand, computation) for operand in instruction.operands)
    if opcode.endswith("-start"):  # the result names the operands again
        written = max(written - reads, 0)
    return reads + written


def _values(instruction: Instruction) -> int:
    return math.prod(instruction.arrays[0].dims)


def _operand(instruction: Instruction, number: int, computation: Computation) -> Array:
    return computation.instructions[instruction.operands[number]].arrays[0]


def _operand_bytes(name: str, computation: Computation) -> int:
    return sum(array.main_memory_bytes for array in computation.instructions[name].arrays)


def _contracted(instruction: Instruction, computation: Computation) -> int:
    left = _operand(instruction, 0, computation)
    return math.prod(left.dims[dim] for dim in instruction.integers("lhs_contracting_dims"))


def _ragged_dot_flops(instruction: Instruction, computation: Computation) -> float:
    products = 2.0 * _values(instruction) * _contracted(instruction, computation)
    ragged = set(instruction.integers("lhs_ragged_dims"))
    if ragged & set(instruction.integers("lhs_contracting_dims")):
        # Each of the groups in the result contracts its own part of the rows.
        return products / _operand(instruction, 2, computation).dims[-1]
    return products


def _custom_call_flops(instruction: Instruction, computation: Computation) -> float | None:
    if is_free_custom_call(instruction):
        return 0.0
    stated = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.attributes)
    if stated:
        return float(stated.group(1))
    contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if contracting:  # the libraries of GPUs
        dims = [int(dim) for dim in json.loads(f"[{contracting.group(1)}]")]
        left = _operand(instruction, 0, computation).dims
        return 2.0 * _values(instruction) * math.prod(left[dim] for dim in dims)
    return None


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """Counts 2 * results * input features * window positions that hit data.

    The TPU compiler writes matrix products as convolutions, and batch dimensions as windows of
    which one position in many hits data and not padding.
    """
    left_names, rest = instruction.attribute("dim_labels").split("_")
    right_names, out_names = rest.split("->")
    left = _operand(instruction, 0, computation).dims
    right = _operand(instruction, 1, computation).dims
    window = dict(_SIZES.findall(instruction.attribute("window")))
    out = instruction.arrays[0].dims
    result = 2.0 * right[right_names.index("i")]
    result *= out[out_names.index("b")] * out[out_names.index("f")]
    spatial = sorted(name for name in out_names if name.isdigit())
    for number, name in enumerate(spatial):

        def setting(key: str, default: str, number: int = number) -> str:
            return window[key].split("x")[number] if key in window else default

        result *= _hits(
            out[out_names.index(name)],
            left[left_names.index(name)],
            right[right_names.index(name)],
            int(setting("stride", "1")),
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    return result


@functools.cache
def _hits(
    outputs: int, inputs: int, window: int, stride: int, pad: int, spread: int, gap: int
) -> int:
    """Counts pairs of output and window position that read an input and not padding."""
    hits = 0
    reach = (inputs - 1) * spread
    for out in range(outputs):
        # position = out * stride - pad + w * gap, which must be a multiple of `spread`
        start = out * stride - pad
        first = max(0, -(start // gap) if start < 0 else 0)
        last = min(window - 1, (reach - start) // gap)
        if last < first:
            continue
        if spread == 1:
            hits += last - first + 1
        else:
            hits += sum((start + w * gap) % spread == 0 for w in range(first, last + 1))
    return hits


def _parameters_in_order(computation: Computation) -> list[Instruction]:
    return [computation.parameters[number] for number in sorted(computation.parameters)]


def _read_bytes(computation: Computation, parameter: Instruction, module: Module) -> int:
    """Counts what a fused computation reads of one of its arguments."""
    whole = sum(array.bytes for array in parameter.arrays)
    read = 0
    for user in computation.users[parameter.name]:
        read += _read_by(user, parameter, computation, module, whole)
    return min(read, whole)


def _read_by(
    user: Instruction, source: Instruction, computation: Computation, module: Module, whole: int
) -> int:
    positions = [n for n, name in enumerate(user.operands) if name == source.name]
    if user.opcode in ("dynamic-slice", "slice", "gather") and positions == [0]:
        return sum(array.bytes for array in user.arrays)
    if user.opcode in ("dynamic-update-slice", "scatter") and positions == [0]:
        return 0
    if user.opcode in _VIEWS:
        users = computation.users[user.name]
        return sum(_read_by(u, user, computation, module, whole) for u in users) if users else whole
    if user.opcode == "fusion":
        fused = module.computations[user.called[0]]
        parameters = _parameters_in_order(fused)
        return sum(_read_bytes(fused, parameters[n], module) for n in positions)
    return whole


def _written_bytes(computation: Computation, fusion: Instruction) -> int:
    """Counts what a fusion writes; an update in place writes only what it updates."""
    root = computation.root
    names = root.operands if root.opcode == "tuple" else (root.name,) * len(fusion.arrays)
    written = 0
    for name, array in zip(names, fusion.arrays, strict=True):
        source = computation.instructions[name]
        while source.opcode == "bitcast":
            source = computation.instructions[source.operands[0]]
        if array.main_memory_bytes and source.opcode == "dynamic-update-slice":
            update = computation.instructions[source.operands[1]].arrays[0]
            written += update.bytes
        elif array.main_memory_bytes and source.opcode == "scatter":
            # Rows are added to: read and written.
            written += 2 * computation.instructions[source.operands[-1]].arrays[0].bytes
        else:
            written += array.main_memory_bytes
    return written
