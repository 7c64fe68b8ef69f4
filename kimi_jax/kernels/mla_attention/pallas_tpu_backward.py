"""Backward pass of attention on a TPU: probabilities are recomputed from the kept log of sums.

Where the gradient of a head's queries fits VMEM, one kernel computes all gradients of a cell (five
products). For longer sequences a second one computes that of the queries (and so two of the
products again).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kimi_jax.kernels.mla_attention.pallas_tpu_cells import (
    F32,
    LOG2_E,
    Cells,
    Folded,
    Operands,
    compiler_params,
    document_ranges,
    input_specs,
)
from kimi_jax.kernels.products import dot


class Kept(NamedTuple):
    """What the backward pass reads beside the operands."""

    d_out: Array  # [B, N, T, U]
    log_sum: Array  # [B, N, 1, T]
    inner: Array  # [B, N, 1, T], out . d_out


def backward(
    operands: Operands, kept: Kept, scale: float, tiles: dict[str, int], interpret: bool
) -> Operands:
    """Returns the gradients, none of the segments."""
    positions = operands.value.shape[2]
    width = operands.k_nope.shape[-1] + operands.k_rope.shape[-1]
    fused = is_fused(positions, width, operands.value.dtype.itemsize, tiles["vmem_mib"])
    run = functools.partial(
        keys_gradient, operands, kept, scale, tiles, interpret=interpret, with_queries=fused
    )
    if fused:
        dk_nope, dk_rope, d_value, dq_nope, dq_rope = run()
    else:
        dk_nope, dk_rope, d_value = run()
        dq_nope, dq_rope = queries_gradient(operands, kept, scale, tiles, interpret)
    # Each head's share was rounded once, as the heads' own gradients are.
    dk_rope = jnp.sum(dk_rope, axis=1, dtype=F32).astype(dk_rope.dtype).transpose(0, 2, 1)
    return Operands(dq_nope, dq_rope, dk_nope, dk_rope, d_value, None)


def is_fused(positions: int, width: int, itemsize: int, vmem_mib: int) -> bool:
    """Whether the gradient of a head's queries fits: the float32 sum, the result twice."""
    return positions * width * (4 + 2 * itemsize) <= vmem_mib * 2**20 // 2


def keys_gradient(
    operands: Operands,
    kept: Kept,
    scale: float,
    tiles: dict[str, int],
    *,
    interpret: bool,
    with_queries: bool,
) -> tuple[Array, ...]:
    """Returns the gradients of k_nope, k_rope by head [B, N, R, T], and values.

    Grid: sequences, heads, rows of the folded triangle (two panels of keys each), panels of
    queries. The sums of a panel of keys stay in VMEM; with_queries, so do those of all queries of
    the head, whose gradients [B, N, H, T] and [B, N, R, T] follow.
    """
    batch, heads, positions, value_width = operands.value.shape
    nope, rope, panel = operands.k_nope.shape[-1], operands.k_rope.shape[-1], tiles["panel"]
    folded = Folded(positions // panel, is_by_keys=True)
    cells = _cells(folded, scale, tiles)
    key_rows = cells.index(lambda b, n, i, j: (b, n, j, 0))
    key_columns = cells.index(lambda b, n, i, j: (b, n, 0, j))
    whole = cells.index(lambda b, n, i, j: (b, n, 0, 0))
    out_specs = [
        pl.BlockSpec((None, None, panel, nope), key_rows),
        pl.BlockSpec((None, None, rope, panel), key_columns),
        pl.BlockSpec((None, None, panel, value_width), key_rows),
    ]
    scratch = [pltpu.VMEM((panel, nope + rope), F32), pltpu.VMEM((panel, value_width), F32)]
    like = [operands.k_nope, operands.q_rope, operands.value]
    if with_queries:
        out_specs += [
            pl.BlockSpec((None, None, nope, positions), whole),
            pl.BlockSpec((None, None, rope, positions), whole),
        ]
        scratch += [pltpu.VMEM((positions // cells.block_q, nope + rope, cells.block_q), F32)]
        like += [operands.q_nope, operands.q_rope]
    call = pl.pallas_call(
        functools.partial(_keys_kernel, cells=cells, with_queries=with_queries),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, *folded.grid),
            in_specs=_input_specs(operands, cells),
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=compiler_params(2 if with_queries else 3, tiles["vmem_mib"]),
        cost_estimate=_cost(operands, of_queries=3 if with_queries else 2, of_values=2),
        interpret=interpret,
        name="mla_attention_backward" if with_queries else "mla_attention_dkv",
    )
    return tuple(call(*_inputs(operands, kept, cells)))


def queries_gradient(
    operands: Operands, kept: Kept, scale: float, tiles: dict[str, int], interpret: bool
) -> tuple[Array, ...]:
    """Returns the gradients of queries, [B, N, H, T] and [B, N, R, T].

    Grid: sequences, heads, rows of the folded triangle (two panels of queries each), panels of
    keys. The sums of a panel of queries stay in VMEM.
    """
    batch, heads, positions, _ = operands.value.shape
    nope, rope, panel = operands.k_nope.shape[-1], operands.k_rope.shape[-1], tiles["panel"]
    folded = Folded(positions // panel, is_by_keys=False)
    cells = _cells(folded, scale, tiles)
    query_columns = cells.index(lambda b, n, i, j: (b, n, 0, i))
    like = operands.q_nope, operands.q_rope
    call = pl.pallas_call(
        functools.partial(_queries_kernel, cells=cells),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, *folded.grid),
            in_specs=_input_specs(operands, cells),
            out_specs=[
                pl.BlockSpec((None, None, width, panel), query_columns) for width in (nope, rope)
            ],
            scratch_shapes=[pltpu.VMEM((panel // cells.block_q, nope + rope, cells.block_q), F32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=compiler_params(3, tiles["vmem_mib"]),
        cost_estimate=_cost(operands, of_queries=2, of_values=1),
        interpret=interpret,
        name="mla_attention_dq",
    )
    return tuple(call(*_inputs(operands, kept, cells)))


def _cells(folded: Folded, scale: float, tiles: dict[str, int]) -> Cells:
    blocks = tiles["backward_queries"], tiles["backward_keys"]
    return Cells(folded, tiles["panel"], *blocks, scale)


def _input_specs(operands: Operands, cells: Cells) -> list[pl.BlockSpec]:
    query_rows = cells.index(lambda b, n, i, j: (b, n, i, 0))
    row = pl.BlockSpec((None, None, 1, cells.panel), cells.index(lambda b, n, i, j: (b, n, 0, i)))
    return [
        *input_specs(operands, cells),
        pl.BlockSpec((None, None, cells.panel, operands.value.shape[-1]), query_rows),
        row,
        row,
    ]


def _inputs(operands: Operands, kept: Kept, cells: Cells) -> tuple[Array, ...]:
    ranges = document_ranges(operands.segments, cells)
    return *ranges, *operands, operands.segments, *kept


def _cost(operands: Operands, *, of_queries: int, of_values: int) -> pl.CostEstimate:
    """Products as wide as queries and as values, for each pair that is not above the diagonal."""
    batch, heads, positions, value_width = operands.value.shape
    pairs = batch * heads * positions**2 // 2
    width = operands.k_nope.shape[-1] + operands.k_rope.shape[-1]
    return pl.CostEstimate(
        flops=2 * pairs * (of_queries * width + of_values * value_width),
        transcendentals=pairs,
        bytes_accessed=3 * operands.value.dtype.itemsize * sum(x.size for x in operands[:5]),
    )


def _keys_kernel(*refs: Any, cells: Cells, with_queries: bool) -> None:
    """One pair of panels: what its cells add to the gradients of keys, values and queries."""
    d_out = refs[11]
    num_sums = 3 if with_queries else 2
    results, (dk, d_value, *dq) = refs[14:-num_sums], refs[-num_sums:]
    at, exists = cells.here()
    row, column = pl.program_id(2), pl.program_id(3)
    num_rows, num_columns = cells.folded.grid

    @pl.when(exists & (at[1] == at[2]))
    def _():
        dk[...] = jnp.zeros_like(dk)
        d_value[...] = jnp.zeros_like(d_value)

    @pl.when((row == 0) & (column == 0))
    def _():
        for total in dq:
            total[...] = jnp.zeros_like(total)

    def cell(u, w, is_masked):
        t, s = cells.queries(u), cells.keys(w)
        keys, queries, probabilities, d_logits = _cell(refs, cells, at, (t, s), is_masked)
        d_value[s] += dot(probabilities.astype(d_out.dtype), d_out[t], 1, 0)
        dk[s] += dot(d_logits, queries, 1, 1)
        for total in dq:
            total[at[1] * (cells.panel // cells.block_q) + u] += dot(keys, d_logits, 0, 0)

    pl.when(exists)(lambda: cells.visit(refs[:4], at, cell))

    @pl.when(exists & (at[1] == cells.folded.panels - 1))
    def _():
        _write_keys(dk, d_value, results[:3], cells)

    @pl.when((row == num_rows - 1) & (column == num_columns - 1))
    def _():
        for total in dq:
            _write_queries(total, results[3:], cells)


def _queries_kernel(*refs: Any, cells: Cells) -> None:
    """One pair of panels: what its cells add to the gradients of queries."""
    *results, dq = refs[14:]
    at, exists = cells.here()

    @pl.when(exists & (at[2] == 0))
    def _():
        dq[...] = jnp.zeros_like(dq)

    def cell(u, w, is_masked):
        keys, _, _, d_logits = _cell(refs, cells, at, (cells.queries(u), cells.keys(w)), is_masked)
        dq[u] += dot(keys, d_logits, 0, 0)

    pl.when(exists)(lambda: cells.visit(refs[:4], at, cell))

    @pl.when(exists & (at[1] == at[2]))
    def _():
        _write_queries(dq, results, cells)


def _write_keys(dk: Any, d_value: Any, results: Any, cells: Cells) -> None:
    dk_nope, dk_rope, d_value_out = results
    nope = dk_nope.shape[-1]

    def write(w, _):
        s = cells.keys(w)
        scaled = cells.scale * dk[s]
        dk_nope[s] = scaled[:, :nope].astype(dk_nope.dtype)
        dk_rope[:, s] = scaled[:, nope:].T.astype(dk_rope.dtype)
        d_value_out[s] = d_value[s].astype(d_value_out.dtype)

    jax.lax.fori_loop(0, dk.shape[0] // cells.block_k, write, None)


def _write_queries(dq: Any, results: Any, cells: Cells) -> None:
    """Writes sums [blocks, H + R, t]."""
    dq_nope, dq_rope = results
    nope = dq_nope.shape[0]

    def write(u, _):
        scaled = cells.scale * dq[u]
        dq_nope[:, cells.queries(u)] = scaled[:nope].astype(dq_nope.dtype)
        dq_rope[:, cells.queries(u)] = scaled[nope:].astype(dq_rope.dtype)

    jax.lax.fori_loop(0, dq.shape[0], write, None)


def _cell(
    refs: Any, cells: Cells, at: tuple, slices: tuple, is_masked: bool
) -> tuple[Array, Array, Array, Array]:
    """Returns a cell's keys, queries, probabilities, and the gradient of its unscaled logits."""
    q_nope, q_rope, k_nope, k_rope, value, q_segments, k_segments = refs[4:11]
    d_out, log_sum, inner = refs[11:14]
    t, s = slices
    # Both parts joined in VMEM are one pass of a wide MXU.
    keys = jnp.concatenate([k_nope[s], k_rope[s]], axis=1)
    queries = jnp.concatenate([q_nope[:, t], q_rope[:, t]], axis=0)
    logits = dot(keys, queries, 1, 0)
    if is_masked:
        logits = cells.mask(logits, (q_segments, k_segments), at, slices)
    probabilities = jnp.exp2(logits * (cells.scale * LOG2_E) - log_sum[:, t] * LOG2_E)
    d_probabilities = dot(value[s], d_out[t], 1, 1)
    d_logits = probabilities * (d_probabilities - inner[:, t])
    return keys, queries, probabilities, d_logits.astype(keys.dtype)
