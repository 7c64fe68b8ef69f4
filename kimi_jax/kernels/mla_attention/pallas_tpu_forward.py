"""Forward pass of attention on a TPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kimi_jax.kernels.mla_attention.pallas_tpu_cells import (
    F32,
    LOG2_E,
    MASKED,
    Cells,
    Folded,
    Operands,
    compiler_params,
    document_ranges,
    input_specs,
)
from kimi_jax.kernels.products import dot


def forward(
    operands: Operands, scale: float, tiles: dict[str, int], interpret: bool
) -> tuple[Float[Array, "B N T U"], Float[Array, "B N 1 T"], Float[Array, "B N 1 T"]]:
    """Returns the output, and each query's largest logit and log of its sum.

    Grid: sequences, heads, rows of the folded triangle (two panels of queries each), panels of
    keys. The last is sequential: running maximum, sum and output of a panel of queries stay in
    VMEM. Queries and outputs cross HBM once, keys and values once for every panel of queries.
    """
    batch, heads, positions, value_width = operands.value.shape
    panel, block_q = tiles["panel"], tiles["forward_queries"]
    folded = Folded(positions // panel, is_by_keys=False)
    cells = Cells(folded, panel, block_q, tiles["forward_keys"], scale)
    row = pl.BlockSpec((None, None, 1, panel), cells.index(lambda b, n, i, j: (b, n, 0, i)))
    rows = pl.BlockSpec(
        (None, None, panel, value_width), cells.index(lambda b, n, i, j: (b, n, i, 0))
    )
    of_queries = jax.ShapeDtypeStruct((batch, heads, 1, positions), F32)
    pairs = batch * heads * positions**2 // 2
    width = operands.k_nope.shape[-1] + operands.k_rope.shape[-1]
    call = pl.pallas_call(
        functools.partial(_kernel, cells=cells),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, *folded.grid),
            in_specs=input_specs(operands, cells),
            out_specs=[rows, row, row],
            scratch_shapes=[
                pltpu.VMEM((panel // block_q, 1, block_q), F32),
                pltpu.VMEM((panel // block_q, 1, block_q), F32),
                pltpu.VMEM((panel // block_q, value_width, block_q), F32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(operands.value.shape, operands.value.dtype),
            of_queries,
            of_queries,
        ],
        compiler_params=compiler_params(3, tiles["vmem_mib"]),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (width + value_width),
            transcendentals=pairs,
            bytes_accessed=2 * operands.value.dtype.itemsize * sum(x.size for x in operands[:5]),
        ),
        interpret=interpret,
        name="mla_attention_forward",
    )
    ranges = document_ranges(operands.segments, cells)
    return tuple(call(*ranges, *operands, operands.segments))


def _kernel(*refs: Any, cells: Cells) -> None:
    """One pair of panels: for each cell its logits and a step of the online softmax.

    The running maximum (arXiv 2112.05682) is of logits before scaling: the scale joins the change
    of base of the exponential.
    """
    q_nope, q_rope, k_nope, k_rope, value, q_segments, k_segments = refs[4:11]
    out, largest_out, log_sum_out, largest, total, weighted = refs[11:]
    at, exists = cells.here()
    to_base_2 = cells.scale * LOG2_E

    @pl.when(exists & (at[2] == 0))
    def _():
        largest[...] = jnp.full_like(largest, MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    def cell(u, w, is_masked):
        t, s = cells.queries(u), cells.keys(w)
        # Both parts joined in VMEM are one pass of a wide MXU.
        keys = jnp.concatenate([k_nope[s], k_rope[s]], axis=1)
        queries = jnp.concatenate([q_nope[:, t], q_rope[:, t]], axis=0)
        logits = dot(keys, queries, 1, 0)
        if is_masked:
            logits = cells.mask(logits, (q_segments, k_segments), at, (t, s))
        new_largest = jnp.maximum(largest[u], jnp.max(logits, axis=0, keepdims=True))
        fading = jnp.exp2((largest[u] - new_largest) * to_base_2)
        exponentials = jnp.exp2((logits - new_largest) * to_base_2)
        largest[u] = new_largest
        total[u] = fading * total[u] + jnp.sum(exponentials, axis=0, keepdims=True)
        part = dot(value[s], exponentials.astype(value.dtype), 0, 0)
        weighted[u] = fading * weighted[u] + part

    pl.when(exists)(lambda: cells.visit(refs[:4], at, cell))

    @pl.when(exists & (at[1] == at[2]))
    def _():
        def write(u, _):
            t = cells.queries(u)
            out[t] = (weighted[u] / total[u]).T.astype(out.dtype)
            largest_out[:, t] = largest[u] * cells.scale
            log_sum_out[:, t] = largest[u] * cells.scale + jnp.log(total[u])

        jax.lax.fori_loop(0, largest.shape[0], write, None)
