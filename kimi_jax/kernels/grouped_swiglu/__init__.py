"""Weighted sum of the SwiGLU experts chosen for each token."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import Implementation, ResidualFormat
from kimi_jax.kernels.checks import check_same_dtype, check_shapes
from kimi_jax.kernels.grouped_swiglu import pallas_gpu, pallas_tpu, reference, xla, xla_accelerator
from kimi_jax.kernels.selection import select
from kimi_jax.quantization.fake_quant import Weight, dense


def _on_arrays(run: Callable[..., Array]) -> Callable[..., Array]:
    """Gives a program of arrays the values of packed weights."""

    def run_dense(x: Array, w_gate: Weight, w_up: Weight, w_down: Weight, *others) -> Array:
        return run(x, *(dense(w, x.dtype) for w in (w_gate, w_up, w_down)), *others)

    return run_dense


_AVAILABLE = {
    Implementation.XLA: _on_arrays(xla.grouped_swiglu),
    Implementation.XLA_ACCELERATOR: _on_arrays(xla_accelerator.grouped_swiglu),
    Implementation.PALLAS_TPU: pallas_tpu.grouped_swiglu,
    Implementation.PALLAS_GPU: pallas_gpu.grouped_swiglu,
    Implementation.REFERENCE: _on_arrays(reference.grouped_swiglu),
}
# The kernels for GPUs were compiled, never run.
_FASTEST = {"tpu": Implementation.PALLAS_TPU}


@jax.named_scope("grouped_swiglu")
def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    *,
    implementation: Implementation = Implementation.AUTO,
    residuals: ResidualFormat = ResidualFormat.COMPUTE,
) -> Float[Array, "W D"]:
    """Returns y[t] = sum_k weights[t, k] * f(x[t], expert_ids[t, k]); no assignment is dropped.

    f(x, e) = (silu(x w_gate[e]) * (x w_up[e])) w_down[e].

    Args:
      x: tokens.
      w_gate: gate projections, [E, D, M]: an array in the tokens' dtype, or packed.
      w_up: up projections, [E, D, M].
      w_down: down projections, [E, M, D].
      expert_ids: chosen experts; one outside [0, E) contributes nothing and costs next to nothing.
      weights: their weights, any floating dtype.
      implementation: which program computes it.
      residuals: format in which x, x w_gate and x w_up wait for the backward pass, which computes
        the gradients of the values as they come back from it.

    Returns:
      The sums, in the tokens' dtype; sums over experts and inside products are float32.

    Raises:
      ValueError: shapes do not fit, or dtypes differ.
      NotImplementedError: the named implementation does not exist, or not with these residuals.
    """
    check_shapes(
        "grouped_swiglu",
        {
            "x": (x, "W D"),
            "w_gate": (w_gate, "E D M"),
            "w_up": (w_up, "E D M"),
            "w_down": (w_down, "E M D"),
            "expert_ids": (expert_ids, "W K"),
            "weights": (weights, "W K"),
        },
    )
    check_same_dtype("grouped_swiglu", {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down})
    run = select("grouped_swiglu", implementation, _AVAILABLE, _FASTEST)
    return run(x, w_gate, w_up, w_down, expert_ids, weights, residuals)


__all__ = ["grouped_swiglu"]
