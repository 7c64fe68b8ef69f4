"""Shapes that the fused experts are tested and timed with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Letters as everywhere; `absent` is the part of the assignments whose expert is elsewhere."""

    tokens: int
    embed: int
    inner: int
    experts: int
    per_token: int
    absent: float = 0.0


TOY = {
    "one_token": Case(tokens=1, embed=4, inner=3, experts=2, per_token=1),
    "odd_sizes": Case(tokens=37, embed=7, inner=5, experts=5, per_token=3),
    "several_tiles": Case(tokens=310, embed=16, inner=8, experts=3, per_token=2),
    "most_experts_elsewhere": Case(
        tokens=260, embed=8, inner=6, experts=4, per_token=4, absent=0.75
    ),
    "all_experts_elsewhere": Case(tokens=9, embed=4, inner=3, experts=2, per_token=2, absent=1.0),
}
COMPARISON = Case(tokens=2048, embed=256, inner=128, experts=16, per_token=4)
COMPARISON_SHARD = Case(tokens=1024, embed=256, inner=128, experts=4, per_token=4, absent=0.75)
KIMI_K2 = Case(tokens=4096, embed=7168, inner=2048, experts=24, per_token=8, absent=15 / 16)
