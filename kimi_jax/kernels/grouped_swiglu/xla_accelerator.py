"""Assignments sorted by expert, and three ragged products over all of them.

A product multiplies each expert's rows with its matrix. Here it is `jax.lax.ragged_dot`, plain XLA:
on TPUs a kernel of its own whose work follows the rows; on CPUs and GPUs every expert multiplies
every row. `pallas_tpu.py` and `pallas_gpu.py` put their own product into this program.

The backward pass keeps the sorted rows and their gate and up products. It is one with the whole
computation: if SwiGLU were differentiated apart, a remat policy that keeps the products' codes
would have to multiply again for the products themselves.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.core.sorted_rows import collect, sort_rows, spread
from kimi_jax.kernels.residuals import keep, restore
from kimi_jax.quantization.fake_quant import Weight

# (rows sorted by expert, matrices, rows of each expert) -> their products, zeros for rows of none;
# differentiable, whatever stands in the rows of none.
Product = Callable[[Array, Weight, Array], Array]


class _Weights(NamedTuple):
    gate: Weight  # [E, D, M]
    up: Weight  # [E, D, M]
    down: Weight  # [E, M, D]


def _ragged_dot(rows: Array, matrices: Array, sizes: Array) -> Array:
    # It sums in float32 and rounds once; it leaves rows of no expert undefined.
    rows = _zero_without_expert(rows, sizes)
    return _zero_without_expert(jax.lax.ragged_dot(rows, matrices, sizes), sizes)


def _zero_without_expert(rows: Array, sizes: Array) -> Array:
    has_expert = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(has_expert[:, None], rows, 0)


def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    residuals: ResidualFormat,
    product: Product = _ragged_dot,
) -> Float[Array, "W D"]:
    """Computes what the package's `grouped_swiglu` describes, by a given product."""
    num_experts, per_token = w_gate.shape[0], expert_ids.shape[1]
    held_here = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(held_here, expert_ids, num_experts).reshape(-1)  # foreign ones come last
    order = sort_rows(expert)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows = spread(per_token, order, x)
    share = spread(1, order, weights.reshape(-1, 1).astype(jnp.float32))
    y = _experts(residuals, product, rows, _Weights(w_gate, w_up, w_down), share, sizes)
    return collect(per_token, order, y)


def _gate_up(
    rows: Array, w_gate: Weight, w_up: Weight, *, sizes: Array, product: Product
) -> tuple[Array, Array]:
    return product(rows, w_gate, sizes), product(rows, w_up, sizes)


def _down(
    gate: Array, up: Array, w_down: Weight, share: Array, *, sizes: Array, product: Product
) -> Array:
    share = _zero_without_expert(share, sizes)
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32) * share
    return product(hidden.astype(gate.dtype), w_down, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(
    residuals: ResidualFormat,
    product: Product,
    rows: Array,
    weights: _Weights,
    share: Array,
    sizes: Array,
) -> Array:
    """Returns the experts' results for rows sorted by expert, each times its share."""
    del residuals
    gate, up = _gate_up(rows, weights.gate, weights.up, sizes=sizes, product=product)
    return _down(gate, up, weights.down, share, sizes=sizes, product=product)


def _forward(residuals, product, rows, weights, share, sizes):
    gate, up = _gate_up(rows, weights.gate, weights.up, sizes=sizes, product=product)
    kept = (
        keep(rows, "expert_inputs", residuals),
        keep(gate, "expert_gate", residuals),
        keep(up, "expert_up", residuals),
    )
    y = _down(gate, up, weights.down, share, sizes=sizes, product=product)
    return y, (kept, weights, share, sizes)


def _backward(residuals, product, saved, d_y):
    kept, weights, share, sizes = saved
    rows, gate, up = (restore(part, d_y.dtype, residuals) for part in kept)
    down = functools.partial(_down, sizes=sizes, product=product)
    d_gate, d_up, d_w_down, d_share = jax.vjp(down, gate, up, weights.down, share)[1](d_y)
    gate_up = functools.partial(_gate_up, sizes=sizes, product=product)
    d_rows, d_w_gate, d_w_up = jax.vjp(gate_up, rows, weights.gate, weights.up)[1]((d_gate, d_up))
    return d_rows, _Weights(d_w_gate, d_w_up, d_w_down), d_share, None


_experts.defvjp(_forward, _backward)
