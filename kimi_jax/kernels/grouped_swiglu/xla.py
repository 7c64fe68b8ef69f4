"""Sort, one loop over tiles of rows, and a gather back: the experts in plain XLA.

Assignments are sorted by expert. A loop whose length is the number of tiles that exist gathers a
tile's tokens, multiplies them with its expert's weights and writes the result in sorted order; each
token then reads its own rows through the inverse permutation, since scattered additions are slow.
The backward pass is the same loop, recomputing what is inside an expert.

Several tiles are written out in one loop body because XLA on CPUs runs independent products of one
body at the same time, while a product of one tile is too small for two cores to share.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import tiles
from kimi_jax.kernels.tiles import dot

TILE_ROWS = 192  # rows of one expert multiplied at a time
TILES_TOGETHER = 4  # tiles written out in one loop body

F32 = jnp.float32


class _Operands(NamedTuple):
    x: Array  # [W, D]
    w_gate: Array  # [E, D, M]
    w_up: Array  # [E, D, M]
    w_down: Array  # [E, M, D]
    weights: Array  # [W, K]


class _Plan(NamedTuple):
    """Where each assignment goes; sorted rows that belong to no expert come last."""

    slot: Array  # [A + TILE_ROWS], assignment (token * K + k) of each sorted row
    row: Array  # [W, K], sorted row of each assignment
    valid: Array  # [W, K], whether the assignment has an expert here
    tiles: tiles.Tiles


@jax.custom_vjp
def _experts(operands: _Operands, expert_ids: Array) -> Array:
    return _forward(operands, _plan(operands, expert_ids))


def _experts_forward(operands: _Operands, expert_ids: Array):
    plan = _plan(operands, expert_ids)
    return _forward(operands, plan), (operands, plan)


def _experts_backward(residuals, d_y: Array):
    return _backward(*residuals, d_y), None


_experts.defvjp(_experts_forward, _experts_backward)


def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Float[Array, "E D M"],
    w_up: Float[Array, "E D M"],
    w_down: Float[Array, "E M D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
) -> Float[Array, "W D"]:
    """Computes what the package's `grouped_swiglu` describes."""
    return _experts(_Operands(x, w_gate, w_up, w_down, weights), expert_ids)


def _plan(operands: _Operands, expert_ids: Array) -> _Plan:
    num_experts = operands.w_gate.shape[0]
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(valid, expert_ids, num_experts).reshape(-1)
    slot = _argsort(expert, num_experts)
    row = jnp.zeros_like(slot).at[slot].set(jnp.arange(slot.size), unique_indices=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return _Plan(
        slot=jnp.pad(slot, (0, TILE_ROWS)),
        row=row.reshape(expert_ids.shape),
        valid=valid,
        tiles=tiles.cut(sizes, slot.shape[0], TILE_ROWS, TILES_TOGETHER),
    )


def _argsort(expert: Array, num_experts: int) -> Array:
    """Sorts assignments by expert, in order within each: [A] -> [A]."""
    # One sort of expert * A + assignment; sorting pairs takes five times as long.
    packed = jnp.sort(expert * expert.size + jnp.arange(expert.size))
    return packed % expert.size


def _forward(operands: _Operands, plan: _Plan) -> Array:
    def body(i, y):
        return _put_all(
            plan,
            i,
            y,
            [_tile_forward(operands, plan, i * TILES_TOGETHER + n) for n in range(TILES_TOGETHER)],
        )

    width = operands.x.shape[1]
    y = jnp.zeros((plan.slot.shape[0], width), F32)
    y = jax.lax.fori_loop(0, _num_bodies(plan), body, y)
    return _combine(y, plan).astype(operands.x.dtype)


def _num_bodies(plan: _Plan) -> Array:
    return -(-plan.tiles.count // TILES_TOGETHER)


def _put_all(plan: _Plan, i: Array, x: Array, parts: list[Array]) -> Array:
    """Writes the tiles of the i-th body, in order."""
    for n, part in enumerate(parts):
        x = tiles.put(x, part, plan.tiles.start[i * TILES_TOGETHER + n])
    return x


def _combine(rows: Array, plan: _Plan) -> Array:
    """Sums each token's sorted rows: [A, D] -> [W, D]."""
    mine = rows[plan.row]
    return jnp.sum(jnp.where(plan.valid[:, :, None], mine.astype(F32), 0.0), axis=1)


class _Tile(NamedTuple):
    """One tile's inputs; weights of rows that are not its own are zero."""

    x: Array  # [rows, D]
    token: Array  # [rows]
    weight: Array  # [rows, 1]
    w_gate: Array  # [D, M]
    w_up: Array  # [D, M]
    w_down: Array  # [M, D]


def _load(operands: _Operands, plan: _Plan, index: Array) -> _Tile:
    experts_per_token = operands.weights.shape[1]
    expert = plan.tiles.group[index]
    slot = tiles.take(plan.slot, plan.tiles.start[index], TILE_ROWS)
    token = slot // experts_per_token
    weight = operands.weights.reshape(-1)[slot].astype(F32)
    own = jnp.arange(TILE_ROWS) < plan.tiles.size[index]
    return _Tile(
        x=operands.x[token],
        token=token,
        weight=jnp.where(own, weight, 0.0)[:, None],
        w_gate=operands.w_gate[expert],
        w_up=operands.w_up[expert],
        w_down=operands.w_down[expert],
    )


def _tile_forward(operands: _Operands, plan: _Plan, index: Array) -> Array:
    tile = _load(operands, plan, index)
    gate, up = dot(tile.x, tile.w_gate, 1, 0), dot(tile.x, tile.w_up, 1, 0)
    hidden = jax.nn.silu(gate) * up * tile.weight
    return dot(hidden.astype(tile.x.dtype), tile.w_down, 1, 0)


def _backward(operands: _Operands, plan: _Plan, d_y: Array) -> _Operands:
    def body(i, grads):
        d_x, d_weight, sums, d_w = grads
        indices = [i * TILES_TOGETHER + n for n in range(TILES_TOGETHER)]
        parts = [_tile_backward(operands, plan, index, d_y) for index in indices]
        d_x = _put_all(plan, i, d_x, [part.x for part in parts])
        d_weight = _put_all(plan, i, d_weight, [part.weight for part in parts])
        for index, part in zip(indices, parts, strict=True):
            sums = [
                jnp.where(plan.tiles.continues[index], old, 0.0) + new
                for old, new in zip(sums, part[3:], strict=True)
            ]
            d_w = [
                tiles.put_group(w, new, plan.tiles.group[index])
                for w, new in zip(d_w, sums, strict=True)
            ]
        return d_x, d_weight, sums, d_w

    num_rows = plan.slot.shape[0]
    start = (
        jnp.zeros((num_rows, operands.x.shape[1]), F32),
        jnp.zeros((num_rows, 1), F32),
        [jnp.zeros(w.shape[1:], F32) for w in operands[1:4]],
        [jnp.zeros(w.shape, F32) for w in operands[1:4]],
    )
    d_x, d_weight, _, d_w = jax.lax.fori_loop(0, _num_bodies(plan), body, start)
    d_weights = jnp.where(plan.valid, d_weight[plan.row, 0], 0.0)
    grads = _Operands(_combine(d_x, plan), *d_w, d_weights)
    return jax.tree.map(lambda grad, operand: grad.astype(operand.dtype), grads, operands)


def _tile_backward(operands: _Operands, plan: _Plan, index: Array, d_y: Array) -> _Tile:
    """Returns the gradients of a tile's inputs, float32."""
    tile = _load(operands, plan, index)
    dtype = tile.x.dtype
    d_y = d_y[tile.token]
    gate, up = dot(tile.x, tile.w_gate, 1, 0), dot(tile.x, tile.w_up, 1, 0)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = dot(d_y, tile.w_down, 1, 1)
    d_weight = jnp.sum(d_hidden * silu * up, axis=1, keepdims=True)
    d_hidden = d_hidden * tile.weight
    d_up = (d_hidden * silu).astype(dtype)
    d_gate = (d_hidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).astype(dtype)
    hidden = (silu * up * tile.weight).astype(dtype)
    return _Tile(
        x=dot(d_gate, tile.w_gate, 1, 1) + dot(d_up, tile.w_up, 1, 1),
        token=tile.token,
        weight=d_weight,
        w_gate=dot(tile.x, d_gate, 0, 0),
        w_up=dot(tile.x, d_up, 0, 0),
        w_down=dot(hidden, d_y, 0, 0),
    )
