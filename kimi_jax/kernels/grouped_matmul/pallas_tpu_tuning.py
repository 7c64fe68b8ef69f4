"""What the tuning tool needs to know of grouped products on TPUs."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kimi_jax.kernels import tpu
from kimi_jax.kernels.cost import Cost
from kimi_jax.kernels.grouped_matmul import cases, pallas_tpu, tpu_tiles, visits
from kimi_jax.kernels.grouped_matmul.cases import Case
from kimi_jax.kernels.grouped_matmul.tpu_tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from kimi_jax.kernels.tunable import Tiles, Tunable

_ITEM_BYTES = 2
_INT4_BYTES = 9 / 16  # of a weight, with its share of a scale
_PARTS = (64, 128, 256)
_ROWS = (256, 512)


def _ends(piece: str, case: Case) -> tuple[int, int]:
    """Returns the contracted width, and that of the result."""
    ends = case.inputs, case.outputs
    return ends if piece == FORWARD else ends[::-1]


def _shape(case: Case, *, piece: str) -> dict[str, int]:
    shape = {"rows": case.rows, "groups": len(case.group_sizes)}
    if piece == WEIGHT_GRADIENT:
        return shape | {"inputs": case.inputs, "outputs": case.outputs}
    contracted, columns = _ends(piece, case)
    return shape | {"columns": columns, "contracted": contracted, "int4": int(case.int4)}


def _operands(case: Case, key: Array) -> dict[str, Any]:
    d_y = jnp.zeros((case.rows, case.outputs), jnp.bfloat16)
    return cases.operands(case, key) | {"d_y": d_y}


def _candidates(case: Case, chip: str, *, piece: str) -> list[dict[str, int]]:
    """Returns tiles that divide the matrix and fit the chip's memory."""
    if piece == WEIGHT_GRADIENT and case.int4:
        return []  # it reads no weights: as in the bfloat16 case
    contracted, columns = _ends(piece, case)
    ends = {"columns": columns}
    if piece == WEIGHT_GRADIENT:
        ends = {"inputs": case.inputs, "outputs": case.outputs}
    widths = [[size for size in tpu_tiles.COLUMNS if end % size == 0] for end in ends.values()]
    choices = [
        dict(zip(("rows", "part", *ends), chosen, strict=True))
        for chosen in itertools.product(_ROWS, _PARTS, *widths)
    ]
    limit = tpu.facts(chip).vmem_bytes
    return [tiles for tiles in choices if tpu_tiles.vmem(tiles, contracted, case.int4) <= limit]


def _plan(case: Case, tiles: Tiles, piece: str) -> tuple[visits.Visits, int]:
    """Returns the visits and in how many parts of rows they multiply."""
    order = visits.by_group if piece == WEIGHT_GRADIENT else visits.by_tile
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    plan = visits.Visits(*map(np.asarray, order(sizes, case.rows, tiles["rows"])))
    parts = -(-plan.end // tiles["part"]) - plan.begin // tiles["part"]
    return plan, int(parts[plan.end > plan.begin].sum())


def _frequencies(
    case: Case, chip: str, tiles: Tiles, *, piece: str
) -> dict[str, tuple[float, ...]]:
    """Follows the kernels: sums set to zero, products of parts, results written."""
    del chip
    plan, parts = _plan(case, tiles, piece)
    count = len(plan.group)
    groups = _runs(plan.group) / count
    if piece == WEIGHT_GRADIENT:
        empty = case.group_sizes.count(0) / count
        of_visit = (empty, parts / count, groups)
    elif case.int4:  # a group's first part is multiplied where its matrix is made
        of_visit = (_runs(plan.target) / count, groups, parts / count - groups)
    else:
        of_visit = (_runs(plan.target) / count, parts / count)
    return {f"grouped_matmul_{piece}": of_visit}


def _runs(numbers: np.ndarray) -> int:
    """Counts runs of equal numbers."""
    return 1 + int((numbers[1:] != numbers[:-1]).sum())


def _cost(case: Case, tiles: Tiles, *, piece: str) -> Cost:
    """Counts whole parts, and rows once for each tile of the matrix that they meet."""
    plan, parts = _plan(case, tiles, piece)
    matrices = sum(size > 0 for size in case.group_sizes) * case.inputs * case.outputs
    flops = 2 * parts * tiles["part"] * case.inputs * case.outputs
    read = _runs(plan.source) * tiles["rows"]
    if piece == WEIGHT_GRADIENT:
        of_x = case.inputs * (case.outputs // tiles["outputs"])
        of_d_y = case.outputs * (case.inputs // tiles["inputs"])
        moved = _ITEM_BYTES * (read * (of_x + of_d_y) + matrices)
        return Cost(flops=flops, bytes=moved)
    contracted, columns = _ends(piece, case)
    rows = read * contracted * (columns // tiles["columns"]) + case.rows * columns
    moved = _ITEM_BYTES * rows + matrices * (_INT4_BYTES if case.int4 else _ITEM_BYTES)
    return Cost(flops=flops, bytes=moved)


def _run(operands: dict[str, Any], tiles: Tiles, *, piece: str) -> Array:
    x, w, d_y, sizes = (operands[name] for name in ("x", "w", "d_y", "group_sizes"))
    if piece == WEIGHT_GRADIENT:
        return pallas_tpu.weight_gradient(x, d_y, sizes, tiles=tiles)
    if piece == INPUT_GRADIENT:
        return pallas_tpu.input_gradient(d_y, w, sizes, tiles=tiles)
    return pallas_tpu.forward(x, w, sizes, tiles=tiles)


def _tunable(piece: str) -> Tunable:
    return Tunable(
        shape=functools.partial(_shape, piece=piece),
        operands=_operands,
        candidates=functools.partial(_candidates, piece=piece),
        frequencies=functools.partial(_frequencies, piece=piece),
        run=functools.partial(_run, piece=piece),
        cost=functools.partial(_cost, piece=piece),
    )


TUNABLE = {
    f"grouped_matmul_{piece}": _tunable(piece)
    for piece in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
}
