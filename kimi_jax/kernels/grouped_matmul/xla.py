"""A loop over tiles of rows that exist, in plain XLA.

`jax.lax.ragged_dot` on CPUs multiplies every row with every matrix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import tiles
from kimi_jax.kernels.products import dot
from kimi_jax.quantization.fake_quant import Weight, dense

TILE_ROWS = 128  # rows of one group multiplied at a time

F32 = jnp.float32


def grouped_matmul(
    x: Float[Array, "A K"], w: Weight, group_sizes: Int[Array, "E"]
) -> Float[Array, "A N"]:
    """Computes what the package's `grouped_matmul` describes; packed weights are unpacked once."""
    return _grouped_matmul(x, dense(w, x.dtype), group_sizes)


@jax.custom_vjp
def _grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    return _multiply(x, w, group_sizes, contract=1)


def _multiply(x: Array, w: Array, group_sizes: Array, contract: int) -> Array:
    """Multiplies each row with dimension `contract` of its group's matrix."""
    num_rows = x.shape[0]
    plan = tiles.cut(group_sizes, num_rows, TILE_ROWS, multiple=1)
    x = _pad(x)

    def body(i, y):
        tile = tiles.take(x, plan.start[i], TILE_ROWS)
        return tiles.put(y, dot(tile, w[plan.group[i]], 1, contract - 1), plan.start[i])

    y = jnp.zeros((x.shape[0], w.shape[3 - contract]), F32)
    y = jax.lax.fori_loop(0, plan.count, body, y)[:num_rows]
    belongs = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(belongs[:, None], y, 0.0).astype(x.dtype)


def _pad(x: Array) -> Array:
    return jnp.pad(x, ((0, TILE_ROWS), (0, 0)))


def _forward(x: Array, w: Array, group_sizes: Array):
    return _multiply(x, w, group_sizes, contract=1), (x, w, group_sizes)


def _backward(residuals, d_y: Array):
    x, w, group_sizes = residuals
    plan = tiles.cut(group_sizes, x.shape[0], TILE_ROWS, multiple=1)
    x_padded, d_y_padded = _pad(x), _pad(d_y)

    def body(i, sums):
        # The sum of the current group travels apart: XLA copies a whole array that one loop body
        # both reads and writes at an index.
        total, d_w = sums
        own = jnp.arange(TILE_ROWS)[:, None] < plan.size[i]
        rows, d_rows = (
            jnp.where(own, tiles.take(a, plan.start[i], TILE_ROWS), 0)
            for a in (x_padded, d_y_padded)
        )
        total = jnp.where(plan.continues[i], total, 0.0) + dot(rows, d_rows, 0, 0)
        return total, tiles.put_group(d_w, total, plan.group[i])

    start = (jnp.zeros(w.shape[1:], F32), jnp.zeros(w.shape, F32))
    _, d_w = jax.lax.fori_loop(0, plan.count, body, start)
    return _multiply(d_y, w, group_sizes, contract=2), d_w.astype(w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)
