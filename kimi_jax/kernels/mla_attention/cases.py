"""Shapes that attention is tested and timed with."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One shape: sequences of `positions` tokens, each `documents` packed documents."""

    batch: int
    positions: int
    heads: int
    nope: int
    rope: int
    value: int
    documents: int = 1


TOY = {
    "one_token": Case(batch=1, positions=1, heads=2, nope=4, rope=2, value=3),
    "one_block": Case(batch=2, positions=50, heads=2, nope=8, rope=4, value=6, documents=3),
    "odd_strips": Case(batch=1, positions=150, heads=3, nope=8, rope=4, value=6, documents=2),
    "ragged_blocks": Case(batch=2, positions=523, heads=2, nope=8, rope=4, value=8, documents=3),
}
COMPARISON = Case(batch=8, positions=256, heads=8, nope=32, rope=16, value=32)
KIMI_K2 = Case(batch=1, positions=4096, heads=64, nope=128, rope=64, value=128)
