"""Shapes that the grouped product is tested and timed with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the groups, rows that belong to none, and both widths."""

    group_sizes: tuple[int, ...]
    spare_rows: int = 0
    inputs: int
    outputs: int


TOY = {
    "one_row": Case(group_sizes=(1,), inputs=3, outputs=5),
    "empty_groups": Case(group_sizes=(0, 70, 0, 200, 0), inputs=7, outputs=5),
    "all_rows_in_one_group": Case(group_sizes=(0, 0, 300), inputs=8, outputs=4),
    "odd_sizes_and_spare_rows": Case(
        group_sizes=(3, 130, 1, 0, 129), spare_rows=40, inputs=9, outputs=11
    ),
    "no_rows_at_all": Case(group_sizes=(0, 0), spare_rows=6, inputs=4, outputs=2),
}
COMPARISON = Case(group_sizes=(512,) * 16, inputs=256, outputs=128)
KIMI_K2 = Case(group_sizes=(682,) * 24, inputs=7168, outputs=2048)  # one of 16 devices
