"""What `tools/tune_kernels.py` needs to know of a kernel.

A package of kernels joins by a mapping `TUNABLE` in its `pallas_tpu` or `pallas_gpu`, from the name
that its table of tiles goes by to a `Tunable`, and by `KIMI_K2` in its `cases`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

Tiles = Mapping[str, int]


class Tunable(NamedTuple):
    """One kernel, seen by its cases.

    Attributes:
      shape: sizes of a case by which its table is searched; see `tile_table.tiles`.
      operands: of a case, by name, random; also under `jax.eval_shape`.
      candidates: tiles of a case worth trying on a chip.
      branch_shares: which share of the grid's steps takes each large branch (`pl.when`) of the
        kernel, in the order of the program; () where the compiler is left with no branch.
      run: calls the kernel on operands with tiles.
    """

    shape: Callable[[Any], dict[str, int]]
    operands: Callable[[Any, Array], dict[str, Any]]
    candidates: Callable[[Any, str], Sequence[Tiles]]
    branch_shares: Callable[[Any, Tiles], Sequence[float]]
    run: Callable[[dict[str, Any], Tiles], Any]
