"""Shapes that the grouped product is tested and timed with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kimi_jax.kernels.cost import Cost
from kimi_jax.quantization import int4
from kimi_jax.quantization.int4 import Int4Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the groups, rows that belong to none, both widths, and the weights' format."""

    group_sizes: tuple[int, ...]
    spare_rows: int = 0
    inputs: int
    outputs: int
    int4: bool = False

    @property
    def rows(self) -> int:
        """Rows of all groups and of none."""
        return sum(self.group_sizes) + self.spare_rows


TOY = {
    "one_row": Case(group_sizes=(1,), inputs=3, outputs=5),
    "empty_groups": Case(group_sizes=(0, 70, 0, 200, 0), inputs=7, outputs=5),
    "all_rows_in_one_group": Case(group_sizes=(0, 0, 300), inputs=8, outputs=4),
    "odd_sizes_and_spare_rows": Case(
        group_sizes=(3, 130, 1, 0, 129), spare_rows=40, inputs=9, outputs=11
    ),
    "no_rows_at_all": Case(group_sizes=(0, 0), spare_rows=6, inputs=4, outputs=2),
}
TOY_INT4 = {
    "one_row_int4": Case(group_sizes=(1,), inputs=32, outputs=5, int4=True),
    "odd_sizes_and_spare_rows_int4": Case(
        group_sizes=(0, 3, 130, 1, 0, 129), spare_rows=40, inputs=96, outputs=11, int4=True
    ),
}
COMPARISON = Case(group_sizes=(512,) * 16, inputs=256, outputs=128)


def _kimi_k2(rows_of_group: int, up: bool, int4: bool) -> Case:
    """The experts of one of 16 devices."""
    widths = (7168, 2048) if up else (2048, 7168)
    return Case(
        group_sizes=(rows_of_group,) * 24,
        spare_rows=16,
        inputs=widths[0],
        outputs=widths[1],
        int4=int4,
    )


KIMI_K2 = {
    f"{name}_{rows_of_group * 24 + 16}_{weights}": _kimi_k2(
        rows_of_group, name == "up", weights == "int4"
    )
    for name in ("up", "down")
    for rows_of_group in (682, 1706)
    for weights in ("bf16", "int4")
}


def operands(case: Case, key: Array) -> dict[str, Array | Int4Weight]:
    """Returns random arguments of `grouped_matmul`, rows and arrays of weights in bfloat16."""
    for_x, for_w = jax.random.split(key)
    shape = (len(case.group_sizes), case.inputs, case.outputs)
    w = jax.random.normal(for_w, shape, jnp.bfloat16)
    return {
        "x": jax.random.normal(for_x, (case.rows, case.inputs), jnp.bfloat16),
        "w": int4.quantize(w) if case.int4 else w,
        "group_sizes": jnp.asarray(case.group_sizes, jnp.int32),
    }


def cost(case: Case) -> Cost:
    """Returns the work of one forward call on `operands`."""
    in_groups = sum(case.group_sizes)
    matrix = case.inputs * case.outputs
    used = sum(size > 0 for size in case.group_sizes) * matrix
    bytes_of_weight = 0.5 + 2 / int4.GROUP_SIZE if case.int4 else 2
    return Cost(
        flops=2 * in_groups * matrix,
        bytes=2 * (in_groups * case.inputs + case.rows * case.outputs) + used * bytes_of_weight,
    )
