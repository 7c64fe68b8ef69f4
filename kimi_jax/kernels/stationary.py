"""A matrix product on a TPU whose weight is made, tile by tile, from what is stored.

Grid: (tiles of outputs, tiles of rows), rows inside. Blocks: a tile of rows with the whole
contracted dimension, and what is stored of one tile of the weight, whole along that dimension too.
Bytes: the stored weight once; the rows once for each tile of outputs, or once at all if they are
one tile; the result once. Invariant: each tile of the weight is made once, for the first tile of
rows, and waits in VMEM for the others. Making it and multiplying the first tile of rows stand in
one branch, where the compiler overlaps vector and matrix units.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kimi_jax.core.param_spec import Leaf
from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tile_table, tpu
from kimi_jax.kernels.tpu import BFLOAT16_ROWS, LANES, up_to_multiple

TRANSPOSED = "_transposed"  # ends the name of a product with a transposed weight
# Rows of a weight that fill whole vectors of what is stored, and whole tiles if transposed.
_INPUTS = 256
_ROWS = (256, 512, 1024)
_OUTPUTS = (256, 512, 1024, 1792)


class Tiles(NamedTuple):
    """Sizes of tiles: rows of x, and outputs."""

    rows: int
    outputs: int


class Shape(NamedTuple):
    """Sizes of a product, and bytes that one entry of the weight takes where it is stored."""

    rows: int
    contracted: int
    outputs: int
    entry_bytes: float


class Weight(NamedTuple):
    """A weight [K, N] that is made tile by tile.

    Attributes:
      name: of the kernel that multiplies with it, in tables of tiles, profiles and dumps.
      stored: what it is made from: matrices [K / k, N], each with its own whole number k.
      zeros: for each of them, what weights of zero are made from.
      inputs: K.
      group_size: rows of the weight that cannot be made without each other.
      make: from one tile of each stored matrix, and a dtype, to the tile of the weight.
    """

    name: str
    stored: tuple[Leaf, ...]
    zeros: tuple[int, ...]
    inputs: int
    group_size: int
    make: Callable[..., Array]

    @property
    def outputs(self) -> int:
        """Columns, N."""
        return self.stored[0].shape[1]

    def product_shape(self, rows: int, transposed: bool) -> Shape:
        """Returns the shape of the product with rows [W, K], or [W, N] if transposed."""
        stored_bytes = sum(a.size * a.dtype.itemsize for a in self.stored)
        ends = (self.outputs, self.inputs) if transposed else (self.inputs, self.outputs)
        return Shape(rows, *ends, stored_bytes / (self.inputs * self.outputs))


def candidates(shape: Shape, chip: str | None) -> list[dict[str, int]]:
    """Returns the sizes of tiles that fit the chip's memory, as keywords of `Tiles`."""
    one_tile = up_to_multiple(shape.rows, BFLOAT16_ROWS)
    rows = sorted({min(size, one_tile) for size in _ROWS})
    outputs = [size for size in (LANES, *_OUTPUTS) if shape.outputs % size == 0]
    wide = [size for size in outputs if size > LANES] or outputs
    sizes = [Tiles(r, o) for r in rows for o in wide]
    limit = tpu.facts(chip).vmem_bytes
    return [tiles._asdict() for tiles in sizes if _vmem(shape, tiles) <= limit]


def by_rule(shape: Shape, chip: str | None) -> Tiles:
    """Returns tiles where none are tabulated: many rows first, then no more than 512 outputs."""
    fitting = [Tiles(**tiles) for tiles in candidates(shape, chip)]
    if not fitting:
        return Tiles(BFLOAT16_ROWS, LANES)
    return max(fitting, key=lambda tiles: (min(tiles.outputs, 512) * tiles.rows, -tiles.outputs))


def choose(name: str, sizes: dict[str, int], shape: Shape) -> Tiles:
    """Returns the tabulated tiles of a kernel, unless they are made for quite other rows."""
    found = tile_table.tiles(name, **sizes)
    one_tile = up_to_multiple(shape.rows, BFLOAT16_ROWS)
    if found is None or found["rows"] < min(_ROWS[0], one_tile):
        return by_rule(shape, target_chip())
    return Tiles(min(found["rows"], one_tile), found["outputs"])


def _vmem(shape: Shape, tiles: Tiles) -> float:
    """Bytes of blocks, two of each that is streamed, of the made weight and of the sums."""
    streamed = 2 * (tiles.rows * shape.contracted + tiles.rows * tiles.outputs)
    entries = shape.contracted * tiles.outputs
    stored = shape.entry_bytes * entries
    return 2 * (streamed + stored) + 2 * entries + 8 * tiles.rows * tiles.outputs


def branch_shares(rows: int, tiles: Tiles) -> tuple[float, ...]:
    """Returns which share of the grid's steps takes each branch, in the order of the program."""
    steps = -(-rows // tiles.rows)
    return () if steps == 1 else (1 / steps, 1 - 1 / steps)


def multiply(
    x: Array, weight: Weight, *, transposed: bool, tiles: Tiles | None, interpret: bool
) -> Array:
    """Multiplies x [W, K] with the weight, or x [W, N] with its transpose.

    Everything is filled up to whole tiles, and the result cut.

    Args:
      x: rows.
      weight: what to multiply with.
      transposed: whether x meets the weight's columns rather than its rows.
      tiles: sizes of tiles; otherwise the chip's table or a rule says.
      interpret: runs on any platform, slowly.

    Returns:
      [W, N], or [W, K] if transposed, in x's dtype; sums are float32.
    """
    inputs = up_to_multiple(weight.inputs, max(_INPUTS, weight.group_size))
    outputs = up_to_multiple(weight.outputs, LANES)
    name = weight.name + TRANSPOSED if transposed else weight.name
    padded = weight._replace(
        name=name,
        stored=tuple(
            _pad(a, a.shape[0] * inputs // weight.inputs, outputs, value)
            for a, value in zip(weight.stored, weight.zeros, strict=True)
        ),
        inputs=inputs,
    )
    shape = padded.product_shape(x.shape[0], transposed)
    if tiles is None:
        sizes = {"rows": x.shape[0], "inputs": weight.inputs, "outputs": weight.outputs}
        tiles = choose(name, sizes, shape)
    rows = _pad(x, up_to_multiple(x.shape[0], tiles.rows), shape.contracted)
    y = _multiply_tiles(rows, padded, transposed=transposed, tiles=tiles, interpret=interpret)
    return y[: x.shape[0], : weight.inputs if transposed else weight.outputs]


def _pad(a: Array, rows: int, columns: int, value: int = 0) -> Array:
    """Fills a matrix up to [rows, columns]."""
    missing = [(0, rows - a.shape[0]), (0, columns - a.shape[1])]
    return a if a.shape == (rows, columns) else jnp.pad(a, missing, constant_values=value)


def _multiply_tiles(
    x: Array, weight: Weight, *, transposed: bool, tiles: Tiles, interpret: bool
) -> Array:
    """Is `multiply` where everything is whole tiles."""
    rows, contracted, outputs, _ = weight.product_shape(x.shape[0], transposed)
    grid = (outputs // tiles.outputs, rows // tiles.rows)
    shape = (tiles.outputs, contracted) if transposed else (contracted, tiles.outputs)
    blocks = [_stored_block(a, shape, weight.inputs, transposed) for a in weight.stored]
    reads = 1 if grid[1] == 1 else grid[0]
    written = rows * outputs * x.dtype.itemsize
    moved = reads * x.nbytes + sum(a.nbytes for a in weight.stored) + written
    waits = grid[1] > 1

    def kernel(x_ref, *refs):
        stored_refs, rest = refs[: len(blocks)], refs[len(blocks) :]
        run = _make_once if waits else _make_and_multiply
        run(x_ref, stored_refs, *rest, make=weight.make, transposed=transposed)

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec((tiles.rows, contracted), lambda n, m: (m, 0)), *blocks],
        out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), lambda n, m: (m, n)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM(shape, x.dtype)] if waits else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu.facts(target_chip()).vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * contracted * outputs, bytes_accessed=moved, transcendentals=0
        ),
        name=weight.name,
        interpret=interpret,
    )(x, *weight.stored)


def _stored_block(
    a: Array, shape: tuple[int, int], weight_rows: int, transposed: bool
) -> pl.BlockSpec:
    """Cuts a stored matrix along the outputs; its rows stand for several of the weight each."""
    block = (shape[0] * a.shape[0] // weight_rows, shape[1])
    return pl.BlockSpec(block, (lambda n, m: (n, 0)) if transposed else (lambda n, m: (0, n)))


def _make_and_multiply(x_ref, stored_refs, y_ref, *, make, transposed) -> None:
    """Makes the tile of the weight for the only tile of rows, without storing it."""
    weight = make(*(ref[...] for ref in stored_refs), x_ref.dtype)
    y_ref[...] = _multiply(x_ref[...], weight, transposed)


def _make_once(x_ref, stored_refs, y_ref, weight_ref, *, make, transposed) -> None:
    """Makes the tile of the weight for the first tile of rows; multiplies each tile of rows."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        weight_ref[...] = make(*(ref[...] for ref in stored_refs), x_ref.dtype)
        y_ref[...] = _multiply(x_ref[...], weight_ref[...], transposed)

    @pl.when(pl.program_id(1) > 0)
    def _():
        y_ref[...] = _multiply(x_ref[...], weight_ref[...], transposed)


def _multiply(x: Array, weight: Array, transposed: bool) -> Array:
    exact = x.dtype == jnp.float32
    y = jax.lax.dot_general(
        x,
        weight,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)
