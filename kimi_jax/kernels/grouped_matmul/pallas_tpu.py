"""Grouped products by Mosaic kernels for TPUs, whose work follows the rows.

`forward` and `input_gradient` are one kernel: rows [A, C] times each group's matrix, along its
dimension C, whole.

* Grid: tiles of result columns, on which a chip's cores share, outside; visits of a tile of rows by
  a group inside (`visits.py`).
* Blocks: `rows` x C of the rows, C x `columns` of the group's matrix, `rows` x `columns` of the
  result. A visit multiplies only those parts of `part` rows in which its group has rows.
* Bytes: matrices of groups with rows once, results once, rows once for each tile of columns.
* Invariant: a matrix's tile is fetched, and if in four bits dequantised, once for each group and
  tile of columns, however many tiles of rows the group has. A result tile is written once.

`weight_gradient` sums x^T d_y over a group's visits.

* Grid: tiles of inputs, tiles of outputs, visits. Blocks: `rows` x `inputs`, `rows` x `outputs`,
  and `inputs` x `outputs` of the result.
* Bytes: x once for each tile of outputs, d_y once for each tile of inputs, results once.
* Invariant: the sum of a group stays in float32 in VMEM and is rounded once.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tpu, tpu_int4
from kimi_jax.kernels.grouped_matmul import tpu_tiles, visits
from kimi_jax.kernels.grouped_matmul.gradients import differentiable
from kimi_jax.kernels.grouped_matmul.tpu_tiles import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Tiles,
)
from kimi_jax.kernels.products import dot
from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight

F32 = jnp.float32


def forward(
    x: Float[Array, "A K"],
    w: Float[Array, "E K N"] | Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "A N"]:
    """Returns x w[g]; rows of no group give zeros.

    Args:
      x: rows sorted by group.
      w: matrices.
      group_sizes: rows of each group.
      tiles: `rows`, `part` (divides `rows`) and `columns`; None takes the table's, or a default.
      interpret: runs on any platform, slowly.
    """
    return _multiply(x, w, group_sizes, FORWARD, tiles, interpret)


def input_gradient(
    d_y: Float[Array, "A N"],
    w: Float[Array, "E K N"] | Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "A K"]:
    """Returns d_y w[g]^T; arguments as in `forward`."""
    return _multiply(d_y, w, group_sizes, INPUT_GRADIENT, tiles, interpret)


def weight_gradient(
    x: Float[Array, "A K"],
    d_y: Float[Array, "A N"],
    group_sizes: Int[Array, "E"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "E K N"]:
    """Returns x_g^T d_y_g in the rows' dtype, zeros for a group without rows.

    Args:
      x: rows sorted by group.
      d_y: gradients of their products.
      group_sizes: rows of each group.
      tiles: `rows`, `part` (divides `rows`), `inputs` and `outputs`.
      interpret: runs on any platform, slowly.
    """
    (num_rows, num_inputs), num_outputs = x.shape, d_y.shape[1]
    num_groups = len(group_sizes)
    limits = {"rows": num_rows, "inputs": num_inputs, "outputs": num_outputs}
    t = tpu_tiles.choose(WEIGHT_GRADIENT, tiles, limits, groups=num_groups)
    x, d_y = _fill_tile(x, t["rows"]), _fill_tile(d_y, t["rows"])
    plan = visits.by_group(group_sizes, num_rows, t["rows"])
    result = jax.ShapeDtypeStruct((num_groups, num_inputs, num_outputs), x.dtype)
    return pl.pallas_call(
        functools.partial(_weight_gradient_kernel, part=t["part"]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(
                pl.cdiv(num_inputs, t["inputs"]),
                pl.cdiv(num_outputs, t["outputs"]),
                plan.group.size,
            ),
            in_specs=[
                pl.BlockSpec((t["rows"], t["inputs"]), lambda i, j, v, *p: (_of(p).source[v], i)),
                pl.BlockSpec((t["rows"], t["outputs"]), lambda i, j, v, *p: (_of(p).source[v], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, t["inputs"], t["outputs"]), lambda i, j, v, *p: (_of(p).group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((t["inputs"], t["outputs"]), F32)],
        ),
        out_shape=result,
        compiler_params=_params(("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost((num_rows, num_inputs, num_outputs), (x, d_y, result)),
        interpret=interpret,
        name=f"grouped_matmul_{WEIGHT_GRADIENT}",
    )(*plan, x, d_y)


def _fill_tile(rows: Array, tile_rows: int) -> Array:
    """Appends zeros where there are fewer rows than one tile has; a last tile may be short."""
    return jnp.pad(rows, ((0, max(tile_rows - rows.shape[0], 0)), (0, 0)))


def _of(prefetched: tuple[Any, ...]) -> visits.Visits:
    """Names what an index map or a kernel gets beforehand."""
    return visits.Visits(*prefetched)


def _multiply(
    x: Array, w: Array | Int4Weight, group_sizes: Array, piece: str, tiles, interpret: bool
) -> Array:
    contract = 1 if piece == FORWARD else 2
    num_rows, width = x.shape
    num_columns = w.shape[3 - contract]
    packed = isinstance(w, Int4Weight)
    limits = {"rows": num_rows, "columns": num_columns}
    t = tpu_tiles.choose(
        piece, tiles, limits, contracted=width, groups=w.shape[0], int4=int(packed)
    )
    columns = t["columns"]
    plan = visits.by_tile(group_sizes, num_rows, t["rows"])
    x = _fill_tile(x, t["rows"])
    result = jax.ShapeDtypeStruct((x.shape[0], num_columns), x.dtype)

    def matrix(inputs_per_entry: int) -> pl.BlockSpec:
        if contract == 1:
            block, where = (width // inputs_per_entry, columns), lambda j: (0, j)
        else:
            block, where = (columns // inputs_per_entry, width), lambda j: (j, 0)
        return pl.BlockSpec((None, *block), lambda j, v, *p: (_of(p).group[v], *where(j)))

    operands, specs, scratch = (w,), [matrix(1)], []
    if packed:
        operands, specs = (w.codes, w.scales), [matrix(CODES_PER_WORD), matrix(w.group_size)]
        shape = (width, columns) if contract == 1 else (columns, width)
        scratch = [pltpu.VMEM(shape, x.dtype)]
    return pl.pallas_call(
        functools.partial(_multiply_kernel, part=t["part"], contract=contract - 1, packed=packed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(pl.cdiv(num_columns, columns), plan.group.size),
            in_specs=[
                pl.BlockSpec((t["rows"], width), lambda j, v, *p: (_of(p).source[v], 0)),
                *specs,
            ],
            out_specs=pl.BlockSpec((t["rows"], columns), lambda j, v, *p: (_of(p).target[v], j)),
            scratch_shapes=scratch,
        ),
        out_shape=result,
        compiler_params=_params(("parallel", "arbitrary")),
        cost_estimate=_cost((num_rows, width, num_columns), (x, *operands, result)),
        interpret=interpret,
        name=f"grouped_matmul_{piece}",
    )(*plan, x, *operands)[:num_rows]


def _multiply_kernel(*refs, part: int, contract: int, packed: bool):
    """One visit: see the module; refs are the visits, rows, matrix, result and scratch."""
    plan, (x, *matrix, y), scratch = _split(refs, len(refs) - packed)
    v = pl.program_id(1)
    before = jnp.maximum(v - 1, 0)
    new_group = (v == 0) | (plan.group[v] != plan.group[before])
    w = scratch[0] if packed else matrix[0]

    @pl.when((v == 0) | (plan.target[v] != plan.target[before]))
    def _():
        y[...] = jnp.zeros_like(y)

    first, stop = plan.begin[v] // part, pl.cdiv(plan.end[v], part)

    def multiply(i):
        rows, own = _part(i, part, plan.begin[v], plan.end[v])
        product = dot(x[rows, :], w[...], 1, contract)
        y[rows, :] = jnp.where(own, product.astype(y.dtype), y[rows, :])

    if packed:

        @pl.when(new_group)
        def _():
            # In one block with a product, which hides most of the arithmetic.
            w[...] = tpu_int4.dequantize(*(ref[...] for ref in matrix), w.dtype)
            multiply(first)

        first = jnp.where(new_group, first + 1, first)
    _for_each(first, stop, multiply)


def _weight_gradient_kernel(*refs, part: int):
    plan, (x, d_y, d_w), (total,) = _split(refs, len(refs) - 1)
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    group = plan.group[v]
    new_group = (v == 0) | (group != plan.group[jnp.maximum(v - 1, 0)])
    first, stop = plan.begin[v] // part, pl.cdiv(plan.end[v], part)

    @pl.when(new_group & (stop == 0))
    def _():
        total[...] = jnp.zeros_like(total)

    def add(i):
        rows, own = _part(i, part, plan.begin[v], plan.end[v])
        # Both: what lies behind the last group may be infinite.
        a, b = (jnp.where(own, ref[rows, :], 0).astype(ref.dtype) for ref in (x, d_y))
        kept = jnp.where(new_group & (i == first), 0.0, total[...])
        total[...] = kept + dot(a, b, 0, 0)

    _for_each(first, stop, add)

    @pl.when((v == last) | (group != plan.group[jnp.minimum(v + 1, last)]))
    def _():
        d_w[...] = total[...].astype(d_w.dtype)


def _split(refs: tuple[Any, ...], num_blocks: int):
    """Returns the visits, the blocks, and the scratch."""
    count = len(visits.Visits._fields)
    return _of(refs[:count]), refs[count:num_blocks], refs[num_blocks:]


def _part(i: Array, part: int, begin: Array, end: Array):
    """Returns part i of a tile as a slice, and which of its rows lie from `begin` to `end`."""
    start = pl.multiple_of(i * part, part)
    row = start + jax.lax.broadcasted_iota(jnp.int32, (part, 1), 0)
    return pl.ds(start, part), (row >= begin) & (row < end)


def _for_each(first: Array, stop: Array, run) -> None:
    """Calls run(i) for each i from `first` to before `stop`."""
    jax.lax.fori_loop(first, stop, lambda i, carry: (run(i), carry)[1], 0)


def _params(semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=tpu.facts(target_chip()).vmem_bytes,
    )


def _cost(sizes: tuple[int, int, int], arrays: tuple[Any, ...]) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * math.prod(sizes),
        bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        transcendentals=0,
    )


grouped_matmul = differentiable(forward, input_gradient, weight_gradient)
