"""A sort and one loop over tiles of rows: the experts in plain XLA.

Assignments are sorted by expert. A loop whose length is the number of tiles that exist gathers a
tile's tokens, multiplies them with its expert's weights and adds the result to the tokens' sums. So
work follows the assignments that have an expert here. The backward pass is the same loop. Tokens,
and gate and up products in sorted order, are kept for it.

More than one tile is written out in a loop body because XLA on CPUs runs independent products of
one body at the same time, while the product of one tile is too small for two cores to share. Gate
and up matrices are put side by side, since one wide product takes less time than two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.kernels import tiles
from kimi_jax.kernels.products import dot
from kimi_jax.kernels.residuals import keep, restore

# Measured on two cores with 512 and with 256 rows an expert: smaller tiles multiply slower, larger
# ones and more of them compute more empty rows.
TILE_ROWS = 192  # rows of one expert multiplied at a time
TILES_TOGETHER = 3  # tiles written out in one loop body

F32 = jnp.float32


class _Operands(NamedTuple):
    x: Array  # [W, D]
    w_gate_up: Array  # [E, D, 2M]
    w_down: Array  # [E, M, D]
    weights: Array  # [W, K]


class _Plan(NamedTuple):
    """The order of work; sorted rows that belong to no expert come last."""

    slot: Array  # [A + TILE_ROWS], assignment (token * K + k) of each sorted row
    tiles: tiles.Tiles


class _Tile(NamedTuple):
    """One tile's operands; rows that are not its own are zero."""

    slot: Array  # [rows]
    token: Array  # [rows]
    x: Array  # [rows, D]
    weight: Array  # [rows, 1]
    own: Array  # [rows, 1], whether the row belongs to the tile
    w_gate_up: Array  # [D, 2M]
    w_down: Array  # [M, D]


class _TileGradients(NamedTuple):
    x: Array  # [rows, D]
    weight: Array  # [rows]
    matrices: tuple[Array, Array]  # of w_gate_up and w_down


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(residuals: ResidualFormat, operands: _Operands, expert_ids: Array) -> Array:
    del residuals
    return _forward(operands, _plan(operands, expert_ids))[0]


def _experts_forward(residuals: ResidualFormat, operands: _Operands, expert_ids: Array):
    plan = _plan(operands, expert_ids)
    y, products = _forward(operands, plan)
    # Gate and up apart: values that share a scale are of one of them.
    gate_and_up = products.reshape(len(products), 2, -1)
    kept = (
        keep(operands.x, "expert_inputs", residuals),
        keep(gate_and_up, "expert_gate_and_up", residuals),
    )
    return y, (kept, operands._replace(x=None), plan)


def _experts_backward(residuals: ResidualFormat, saved, d_y: Array):
    (tokens, gate_and_up), operands, plan = saved
    operands = operands._replace(x=restore(tokens, d_y.dtype, residuals))
    gate_and_up = restore(gate_and_up, F32, residuals)
    products = gate_and_up.reshape(len(gate_and_up), -1)
    return _backward(operands, plan, products, d_y), None


_experts.defvjp(_experts_forward, _experts_backward)


def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Float[Array, "E D M"],
    w_up: Float[Array, "E D M"],
    w_down: Float[Array, "E M D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    residuals: ResidualFormat,
) -> Float[Array, "W D"]:
    """Computes what the package's `grouped_swiglu` describes."""
    w_gate_up = jnp.concatenate([w_gate, w_up], axis=2)
    return _experts(residuals, _Operands(x, w_gate_up, w_down, weights), expert_ids)


def _plan(operands: _Operands, expert_ids: Array) -> _Plan:
    num_experts = operands.w_down.shape[0]
    held_here = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(held_here, expert_ids, num_experts).reshape(-1)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return _Plan(
        slot=jnp.pad(_argsort(expert, num_experts), (0, TILE_ROWS)),
        tiles=tiles.cut(sizes, expert.size, TILE_ROWS, TILES_TOGETHER),
    )


def _argsort(expert: Array, num_experts: int) -> Array:
    """Sorts assignments by expert, in order within each: [A] -> [A]."""
    # One sort of expert * A + assignment; sorting pairs takes five times as long.
    if (num_experts + 1) * expert.size > np.iinfo(np.int32).max:
        raise ValueError(
            f"grouped_swiglu: {expert.size} assignments to {num_experts} experts do not fit int32 "
            "sort keys; give each device fewer tokens at a time (training.accumulation_steps)"
        )
    packed = jnp.sort(expert.astype(jnp.int32) * expert.size + jnp.arange(expert.size))
    return packed % expert.size


def _num_bodies(plan: _Plan) -> Array:
    return -(-plan.tiles.count // TILES_TOGETHER)


def _indices(body: Array) -> list[Array]:
    """The tiles of one loop body."""
    return [body * TILES_TOGETHER + n for n in range(TILES_TOGETHER)]


def _load(operands: _Operands, plan: _Plan, index: Array) -> _Tile:
    expert = plan.tiles.group[index]
    slot = tiles.take(plan.slot, plan.tiles.start[index], TILE_ROWS)
    token = slot // operands.weights.shape[1]
    own = (jnp.arange(TILE_ROWS) < plan.tiles.size[index])[:, None]
    return _Tile(
        slot=slot,
        token=token,
        x=jnp.where(own, operands.x[token], 0),
        weight=jnp.where(own, operands.weights.reshape(-1, 1)[slot].astype(F32), 0.0),
        own=own,
        w_gate_up=operands.w_gate_up[expert],
        w_down=operands.w_down[expert],
    )


def _add_rows(x: Array, rows: Array, at: Array) -> Array:
    return x.at[at].add(rows, mode="promise_in_bounds")


def _forward(operands: _Operands, plan: _Plan) -> tuple[Array, Array]:
    """Returns the sums, and sorted rows times w_gate_up, [A + TILE_ROWS, 2M], float32.

    Rows of the products that no tile owns are arbitrary.
    """

    def body(i, results):
        y, products = results
        loaded = [_load(operands, plan, index) for index in _indices(i)]
        parts = [_tile_forward(tile) for tile in loaded]
        for index, tile, (part, new) in zip(_indices(i), loaded, parts, strict=True):
            y = _add_rows(y, part, tile.token)
            products = tiles.put(products, new, plan.tiles.start[index])
        return y, products

    products = jnp.zeros((plan.slot.size, operands.w_gate_up.shape[2]), F32)
    start = (jnp.zeros(operands.x.shape, F32), products)
    y, products = jax.lax.fori_loop(0, _num_bodies(plan), body, start)
    return y.astype(operands.x.dtype), products


def _tile_forward(tile: _Tile) -> tuple[Array, Array]:
    products = dot(tile.x, tile.w_gate_up, 1, 0)
    gate, up = jnp.split(products, 2, axis=1)
    hidden = jax.nn.silu(gate) * up * tile.weight
    return dot(hidden.astype(tile.x.dtype), tile.w_down, 1, 0), products


def _backward(operands: _Operands, plan: _Plan, products: Array, d_y: Array) -> _Operands:
    def body(i, sums):
        d_x, d_weights, totals, d_matrices = sums
        loaded = [_load(operands, plan, index) for index in _indices(i)]
        starts = [plan.tiles.start[index] for index in _indices(i)]
        kept = [tiles.take(products, start, TILE_ROWS) for start in starts]
        parts = [_tile_backward(tile, rows, d_y) for tile, rows in zip(loaded, kept, strict=True)]
        for index, tile, part in zip(_indices(i), loaded, parts, strict=True):
            d_x = _add_rows(d_x, part.x, tile.token)
            d_weights = _add_rows(d_weights, part.weight, tile.slot)
            # The sum of the current expert travels apart: an array that one loop body both reads
            # and writes at an index is copied whole.
            totals = [
                jnp.where(plan.tiles.continues[index], total, 0.0) + new
                for total, new in zip(totals, part.matrices, strict=True)
            ]
            d_matrices = [
                tiles.put_group(d_w, total, plan.tiles.group[index])
                for d_w, total in zip(d_matrices, totals, strict=True)
            ]
        return d_x, d_weights, totals, d_matrices

    matrices = (operands.w_gate_up, operands.w_down)
    start = (
        jnp.zeros(operands.x.shape, F32),
        jnp.zeros(operands.weights.size, F32),
        [jnp.zeros(w.shape[1:], F32) for w in matrices],
        [jnp.zeros(w.shape, F32) for w in matrices],
    )
    d_x, d_weights, _, d_w = jax.lax.fori_loop(0, _num_bodies(plan), body, start)
    grads = _Operands(d_x, *d_w, d_weights.reshape(operands.weights.shape))
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), grads, operands)


def _tile_backward(tile: _Tile, products: Array, d_y: Array) -> _TileGradients:
    """Returns the gradients of a tile's operands, float32."""
    dtype = tile.x.dtype
    d_rows = jnp.where(tile.own, d_y[tile.token], 0)
    gate, up = jnp.split(jnp.where(tile.own, products, 0.0), 2, axis=1)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_weighted = dot(d_rows, tile.w_down, 1, 1)
    d_hidden = d_weighted * tile.weight
    d_up = d_hidden * silu
    d_gate = d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_gate_up = jnp.concatenate([d_gate, d_up], axis=1).astype(dtype)
    weighted = (silu * up * tile.weight).astype(dtype)
    return _TileGradients(
        x=dot(d_gate_up, tile.w_gate_up, 1, 1),
        weight=jnp.sum(d_weighted * silu * up, axis=1),
        matrices=(dot(tile.x, d_gate_up, 0, 0), dot(weighted, d_rows, 0, 0)),
    )
