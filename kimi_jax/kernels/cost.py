"""What a call of a kernel has to do at least."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Work of one call; see `tools/bench_kernels.py`, which divides it by a chip's rates."""

    flops: float  # a multiplication and an addition count as two
    bytes: float  # each operand read and each result written once
