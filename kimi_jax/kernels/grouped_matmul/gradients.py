"""A grouped product made of its three kernels."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from kimi_jax.quantization.fake_quant import FakeQuantized, Weight
from kimi_jax.quantization.int4 import Int4Weight

Piece = Callable[..., Array]


def differentiable(
    forward: Piece, input_gradient: Piece, weight_gradient: Piece
) -> Callable[[Array, Weight, Array], Array]:
    """Returns `grouped_matmul(x, w, group_sizes)`, differentiable, for a weight in any form.

    Args:
      forward: (x [A, K], w [E, K, N], group_sizes) -> x w[g], rows of no group zero; w is an array
        or an `Int4Weight`.
      input_gradient: (d_y [A, N], w, group_sizes) -> d_y w[g]^T.
      weight_gradient: (x, d_y, group_sizes) -> x_g^T d_y_g, zeros for a group without rows.

    Returns:
      A function whose gradient goes to x, and to w if that is an array, or to its carrier if it has
      one. An `Int4Weight` alone gets none.
    """

    @jax.custom_vjp
    def grouped_matmul(x: Array, w: Weight, group_sizes: Array) -> Array:
        return forward(x, _operand(w), group_sizes)

    def run_forward(x, w, group_sizes):
        # A carrier is not kept: its values are not those that were multiplied.
        kept = w.replace(carrier=None) if isinstance(w, FakeQuantized) else w
        return forward(x, _operand(w), group_sizes), (x, kept, group_sizes)

    def run_backward(residuals: Any, d_y: Array):
        x, w, group_sizes = residuals
        d_x = input_gradient(d_y, _operand(w), group_sizes)
        if isinstance(w, Int4Weight):
            return d_x, None, None
        d_w = weight_gradient(x, d_y, group_sizes)
        if isinstance(w, FakeQuantized):
            no_gradient = Int4Weight(codes=None, scales=None)
            return d_x, FakeQuantized(carrier=d_w, quantized=no_gradient), None
        return d_x, d_w, None

    grouped_matmul.defvjp(run_forward, run_backward)
    return grouped_matmul


def _operand(w: Weight) -> Array | Int4Weight:
    return w.quantized if isinstance(w, FakeQuantized) else w
