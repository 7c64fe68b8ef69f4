"""Shapes of products with a weight of four bits."""

import dataclasses
from collections.abc import Mapping, Sequence

from kimi_jax.quantization import int4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows of activations, sizes of the weight, and weights that share a scale."""

    rows: int
    inputs: int
    outputs: int
    group_size: int = int4.GROUP_SIZE


TOY = {
    "one_row": Case(rows=1, inputs=256, outputs=128),
    "odd_rows_and_outputs": Case(rows=19, inputs=96, outputs=200),
    "two_tiles_each_way": Case(rows=40, inputs=512, outputs=256),
    "large_groups": Case(rows=16, inputs=384, outputs=130, group_size=64),
}


def of_experts(rows: Mapping[str, Sequence[int]]) -> dict[str, Case]:
    """Returns cases of an expert of Kimi K2, up and gate, then down, for what rows are used for."""
    return {
        f"{use}_{count}_{name}": Case(rows=count, inputs=inputs, outputs=outputs)
        for name, inputs, outputs in (("up", 7168, 2048), ("down", 2048, 7168))
        for use, counts in rows.items()
        for count in counts
    }
