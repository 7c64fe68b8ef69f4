"""What the TPU kernels of attention share: operands, the order of their work, and masks.

A step of a grid holds a panel of queries and one of keys in VMEM; a loop in it goes over the cells:
a block of queries and a block of keys that is not wholly later. So the steps' own cost is shared by
many cells, while cells are small enough to follow the diagonal closely.

Logits are [keys, queries]: what belongs to a query is then a row, which lies along lanes, and
reductions over keys run along sublanes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

MASKED = -1e30  # logit of a masked pair; finite, so that differences of two are numbers
LOG2_E = math.log2(math.e)

F32 = jnp.float32


class Operands(NamedTuple):
    """Heads before positions; queries have their positions last, so that R = 64 is not padded."""

    q_nope: Array  # [B, N, H, T]
    q_rope: Array  # [B, N, R, T]
    k_nope: Array  # [B, N, T, H]
    k_rope: Array  # [B, T, R]
    value: Array  # [B, N, T, U]
    segments: Array  # [B, 1, T]


class Folded(NamedTuple):
    """A triangle of pairs of panels as a rectangle: its first row and its last share a row, etc.

    Every row of the rectangle is then equally long, so that no step is wasted above the diagonal
    and cores that share the rows are equally busy. All is arithmetic: nothing is stored for a pair.

    Attributes:
      panels: number of panels, of queries and of keys.
      is_by_keys: whether a row of the triangle is a panel of keys, with the panels of queries from
        the diagonal on; or else a panel of queries, with the panels of keys up to the diagonal.
    """

    panels: int
    is_by_keys: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        return (1, 1) if self.panels == 1 else (-(-self.panels // 2), self.panels + 1)

    def length(self, panel: Any) -> Any:
        """Returns the number of pairs in a row of the triangle."""
        return self.panels - panel if self.is_by_keys else panel + 1

    def at(self, row: Any, column: Any) -> tuple[Array, Array]:
        """Returns the panels of queries and of keys of a place in the rectangle."""
        is_first = column < self.length(row)
        mine = jnp.where(is_first, row, self.panels - 1 - row)
        other = jnp.where(is_first, column, column - self.length(row))
        return (mine + other, mine) if self.is_by_keys else (mine, other)

    def exists(self, row: Any, column: Any) -> Any:
        """False in the second half of a middle row, which would be computed twice."""
        return (2 * row != self.panels - 1) | (column < self.length(row))


class Cells(NamedTuple):
    """Static facts of a kernel."""

    folded: Folded
    panel: int  # positions
    block_q: int  # positions of a cell
    block_k: int
    scale: float

    def index(self, place: Callable) -> Callable:
        """Returns the index map `place(sequence, head, panel of queries, panel of keys)`."""
        return lambda b, n, row, column, *_: place(b, n, *self.folded.at(row, column))

    def here(self) -> tuple[tuple[Array, Array, Array], Array]:
        """Returns the step's sequence, panel of queries and panel of keys; whether it exists."""
        row, column = pl.program_id(2), pl.program_id(3)
        at = pl.program_id(0), *self.folded.at(row, column)
        return at, self.folded.exists(row, column)

    def visit(self, ranges: tuple, at: tuple[Array, Array, Array], body: Callable) -> None:
        """Calls `body(u, w, is_masked)` for cells with a visible pair; keys come in order.

        Args:
          ranges: `document_ranges` of the blocks of queries and of keys.
          at: sequence, panel of queries and panel of keys.
          body: takes the numbers of the blocks within their panels, and whether any pair of the
            cell may be masked.
        """
        num_q, num_k = self.panel // self.block_q, self.panel // self.block_k
        sequence, query_panel, key_panel = at

        def over_keys(u, _):
            to_diagonal = jax.lax.div((u + 1) * self.block_q - 1, self.block_k) + 1
            end = jnp.where(query_panel == key_panel, to_diagonal, num_k)

            def cell(w, _):
                here = sequence, query_panel * num_q + u, key_panel * num_k + w
                self._when_visible(ranges, here, functools.partial(body, u, w))

            jax.lax.fori_loop(0, end, cell, None)

        jax.lax.fori_loop(0, num_q, over_keys, None)

    def _when_visible(self, ranges: tuple, here: tuple, body: Callable) -> None:
        """Runs `body(is_masked)` for a sequence's block of queries and of keys, or nothing."""
        q_low, q_high, k_low, k_high = ranges
        (sequence, i, j), positions = here, self.folded.panels * self.panel
        at_q = sequence * (positions // self.block_q) + i
        at_k = sequence * (positions // self.block_k) + j
        meet = (k_low[at_k] <= q_high[at_q]) & (q_low[at_q] <= k_high[at_k])
        one_document = (q_low[at_q] == k_high[at_k]) & (q_high[at_q] == k_low[at_k])
        all_visible = one_document & ((j + 1) * self.block_k <= i * self.block_q + 1)
        pl.when(meet & all_visible)(lambda: body(False))
        pl.when(meet & jnp.logical_not(all_visible))(lambda: body(True))

    def mask(self, logits: Array, segments: tuple, at: tuple, slices: tuple) -> Array:
        """Masks the logits [s, t] of a slice of the panel of queries and one of that of keys."""
        (q_segments, k_segments), (t, s) = segments, slices
        keys_down = jnp.broadcast_to(k_segments[:, s], (128, logits.shape[0])).T[:, :1]
        query, key = (
            at[1 + axis] * self.panel
            + slices[axis].start
            + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1 - axis)
            for axis in (0, 1)
        )
        return jnp.where((key <= query) & (keys_down == q_segments[:, t]), logits, MASKED)

    def queries(self, u: Array) -> pl.Slice:
        """Positions of block u of queries within its panel."""
        return pl.ds(pl.multiple_of(u * self.block_q, self.block_q), self.block_q)

    def keys(self, w: Array) -> pl.Slice:
        """Positions of block w of keys within its panel."""
        return pl.ds(pl.multiple_of(w * self.block_k, self.block_k), self.block_k)


def document_ranges(segments: Int[Array, "B 1 T"], cells: Cells) -> tuple[Array, ...]:
    """Returns the least and the largest document of each block of queries, then of keys.

    Each is [B * blocks].
    """
    by_query, by_key = (segments.reshape(-1, block) for block in (cells.block_q, cells.block_k))
    return by_query.min(axis=1), by_query.max(axis=1), by_key.min(axis=1), by_key.max(axis=1)


def input_specs(operands: Operands, cells: Cells) -> list[pl.BlockSpec]:
    """Panels of the operands, with the segments once by query and once by key."""
    nope, rope = operands.k_nope.shape[-1], operands.k_rope.shape[-1]
    query_columns = cells.index(lambda b, n, i, j: (b, n, 0, i))
    key_rows = cells.index(lambda b, n, i, j: (b, n, j, 0))
    return [
        pl.BlockSpec((None, None, nope, cells.panel), query_columns),
        pl.BlockSpec((None, None, rope, cells.panel), query_columns),
        pl.BlockSpec((None, None, cells.panel, nope), key_rows),
        pl.BlockSpec((None, cells.panel, rope), cells.index(lambda b, n, i, j: (b, j, 0))),
        pl.BlockSpec((None, None, cells.panel, operands.value.shape[-1]), key_rows),
        pl.BlockSpec((None, 1, cells.panel), cells.index(lambda b, n, i, j: (b, 0, i))),
        pl.BlockSpec((None, 1, cells.panel), cells.index(lambda b, n, i, j: (b, 0, j))),
    ]


def compiler_params(num_parallel: int, vmem_mib: int) -> pltpu.CompilerParams:
    """The first dimensions of the grid of four are parallel; the others are not."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * num_parallel + ("arbitrary",) * (4 - num_parallel),
        vmem_limit_bytes=vmem_mib * 2**20,
    )
