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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import tile_table
from kimi_jax.kernels.grouped_matmul import visits
from kimi_jax.kernels.grouped_matmul.gradients import differentiable
from kimi_jax.kernels.products import dot
from kimi_jax.quantization.int4 import CODES_PER_WORD, Int4Weight

F32 = jnp.float32
Tiles = Mapping[str, int]

_MIB = 2**20
# Of 64 MiB, and of 128 on v6e; the compiler wants some for itself.
_VMEM_BYTES = {"v5p": 60 * _MIB, "v6e": 112 * _MIB, "tpu7x": 56 * _MIB}
_SMALLEST_VMEM_BYTES = 56 * _MIB
# v5p has no arithmetic in bfloat16. A code of three bits times a scale of eight is exact before it
# is rounded in either format, so both give the same values.
_BFLOAT16_ARITHMETIC = ("v6e", "tpu7x")
_SIGNS = -0x77777778  # 0x88888888: turns nibbles of code + 8 into two's complement


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
    return _multiply(x, w, group_sizes, "forward", tiles, interpret)


def input_gradient(
    d_y: Float[Array, "A N"],
    w: Float[Array, "E K N"] | Int4Weight,
    group_sizes: Int[Array, "E"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "A K"]:
    """Returns d_y w[g]^T; arguments as in `forward`."""
    return _multiply(d_y, w, group_sizes, "input_gradient", tiles, interpret)


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
    t = _tiles("weight_gradient", tiles, limits, groups=num_groups)
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
        name="grouped_matmul_weight_gradient",
    )(*plan, x, d_y)


def _of(prefetched: tuple[Any, ...]) -> visits.Visits:
    """Names what an index map or a kernel gets beforehand."""
    return visits.Visits(*prefetched)


def _multiply(
    x: Array, w: Array | Int4Weight, group_sizes: Array, piece: str, tiles, interpret: bool
) -> Array:
    contract = 1 if piece == "forward" else 2
    num_rows, width = x.shape
    num_columns = w.shape[3 - contract]
    packed = isinstance(w, Int4Weight)
    limits = {"rows": num_rows, "columns": num_columns}
    t = _tiles(piece, tiles, limits, contracted=width, groups=w.shape[0], int4=int(packed))
    columns = t["columns"]
    plan = visits.by_tile(group_sizes, num_rows, t["rows"])
    result = jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype)

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
    )(*plan, x, *operands)


def _multiply_kernel(*refs, part: int, contract: int, packed: bool):
    """One visit: see the module; refs are the visits, rows, matrix, result and scratch."""
    plan, (x, *matrix, y), scratch = _split(refs, len(refs) - packed)
    v = pl.program_id(1)
    before = jnp.maximum(v - 1, 0)
    if packed:
        (w,) = scratch

        @pl.when((v == 0) | (plan.group[v] != plan.group[before]))
        def _():
            w[...] = _dequantise(*matrix, w.dtype)
    else:
        (w,) = matrix

    @pl.when((v == 0) | (plan.target[v] != plan.target[before]))
    def _():
        y[...] = jnp.zeros_like(y)

    def multiply(rows, own):
        product = dot(x[rows, :], w[...], 1, contract)
        y[rows, :] = jnp.where(own, product.astype(y.dtype), y[rows, :])

    _for_owned_parts(plan.begin[v], plan.end[v], part, multiply)


def _weight_gradient_kernel(*refs, part: int):
    plan, (x, d_y, d_w), (total,) = _split(refs, len(refs) - 1)
    v, last = pl.program_id(2), pl.num_programs(2) - 1
    group = plan.group[v]

    @pl.when((v == 0) | (group != plan.group[jnp.maximum(v - 1, 0)]))
    def _():
        total[...] = jnp.zeros_like(total)

    def add(rows, own):
        # Both: what lies behind the last group may be infinite.
        a, b = (jnp.where(own, ref[rows, :], 0).astype(ref.dtype) for ref in (x, d_y))
        total[...] += dot(a, b, 0, 0)

    _for_owned_parts(plan.begin[v], plan.end[v], part, add)

    @pl.when((v == last) | (group != plan.group[jnp.minimum(v + 1, last)]))
    def _():
        d_w[...] = total[...].astype(d_w.dtype)


def _split(refs: tuple[Any, ...], num_blocks: int):
    """Returns the visits, the blocks, and the scratch."""
    count = len(visits.Visits._fields)
    return _of(refs[:count]), refs[count:num_blocks], refs[num_blocks:]


def _for_owned_parts(begin: Array, end: Array, part: int, run) -> None:
    """Calls run(rows, own) for each part of a tile that holds rows from `begin` to `end`."""

    def body(i, carry):
        start = pl.multiple_of(i * part, part)
        row = start + jax.lax.broadcasted_iota(jnp.int32, (part, 1), 0)
        run(pl.ds(start, part), (row >= begin) & (row < end))
        return carry

    jax.lax.fori_loop(begin // part, pl.cdiv(end, part), body, 0)


def _dequantise(codes, scales, dtype: Any) -> Array:
    """Returns the values of a tile, as `quantization.int4.dequantize` does."""
    exact = dtype == jnp.bfloat16 and target_chip() in _BFLOAT16_ARITHMETIC
    arithmetic = jnp.bfloat16 if exact else F32
    values = pltpu.bitcast(codes[...] ^ jnp.int32(_SIGNS), jnp.int4).astype(arithmetic)
    num_groups, width = scales.shape
    values = values.reshape(num_groups, -1, width)
    values = values * scales[...].astype(arithmetic)[:, None, :]
    return values.reshape(-1, width).astype(dtype)


def _tiles(
    piece: str, given: Tiles | None, limits: Mapping[str, int], **shape: int
) -> dict[str, int]:
    """Returns tiles no larger than the arrays: those given, tabulated, or of the chip's rule."""
    chosen = given or tile_table.tiles(f"grouped_matmul.{piece}", **limits, **shape)
    if chosen is None:
        chosen = {"rows": 512, "part": 128, "columns": 512, "inputs": 512, "outputs": 1024}
    chosen = {name: min(size, limits.get(name, size)) for name, size in chosen.items()}
    if chosen["rows"] % chosen["part"]:
        chosen["part"] = chosen["rows"]
    return chosen


def _params(semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=_VMEM_BYTES.get(target_chip(), _SMALLEST_VMEM_BYTES),
    )


def _cost(sizes: tuple[int, int, int], arrays: tuple[Any, ...]) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * math.prod(sizes),
        bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        transcendentals=0,
    )


grouped_matmul = differentiable(forward, input_gradient, weight_gradient)
