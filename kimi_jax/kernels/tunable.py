"""What `tools/tune_kernels.py` needs to know of a kernel.

A package of kernels joins by a mapping `TUNABLE` in its `pallas_tpu` or `pallas_gpu`, or in a
module beside that, `pallas_tpu_tuning`; from the name that a table of tiles goes by to a `Tunable`.
Its `cases` have `KIMI_K2`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from kimi_jax.kernels.cost import Cost

Tiles = Mapping[str, int]


class Tunable(NamedTuple):
    """One operation, seen by its cases.

    Attributes:
      shape: sizes of a case by which its table is searched; see `tile_table.tiles`.
      operands: of a case, by name, random; also under `jax.eval_shape`.
      candidates: tiles of a case worth trying on a chip.
      frequencies: of a case, a chip and tiles: for each Pallas kernel that runs, by the name it was
        given, how often its branches are taken and how long its loops are, as
        `analysis.schedules.bundles` wants them; () for a kernel without either.
      run: calls the operation on operands with tiles.
      cost: of a case and tiles: operations with those that are masked or padding, and bytes with
        those fetched again; None where the compiler counts rightly.
      is_tabulated: whether its tiles belong in the tables; not where it is only a comparison.
    """

    shape: Callable[[Any], dict[str, int]]
    operands: Callable[[Any, Array], dict[str, Any]]
    candidates: Callable[[Any, str], Sequence[Tiles]]
    frequencies: Callable[[Any, str, Tiles], Mapping[str, Sequence[float]]]
    run: Callable[[dict[str, Any], Tiles], Any]
    cost: Callable[[Any, Tiles], Cost] | None = None
    is_tabulated: bool = True
