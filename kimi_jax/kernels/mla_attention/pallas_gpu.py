"""Attention on Hopper GPUs, in Mosaic GPU: the gradient's rule around three kernels.

Grids, blocks, bytes and invariants: `pallas_gpu_forward.py` and `pallas_gpu_backward.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.hopper.program import TILE
from kimi_jax.kernels.hopper.softmax import F32, LOG2_E
from kimi_jax.kernels.mla_attention.pallas_gpu_backward import backward
from kimi_jax.kernels.mla_attention.pallas_gpu_blocks import Keys, Queries
from kimi_jax.kernels.mla_attention.pallas_gpu_forward import forward

_WIDTHS = (64, 128)  # of heads without rotation, and of values: shared memory holds no more
_ROPE_WIDTH = 64

_Operands = tuple[Array, Array, Array, Array, Array, Array]


def mla_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B T N H"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T N U"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Computes what the package's `mla_attention` describes, in bfloat16 on a Hopper GPU.

    Raises:
      NotImplementedError: another GPU, another dtype, or widths that the blocks do not fit.
    """
    program.require("mla_attention", q_nope.dtype, interpret)
    _check_widths(q_nope.shape[-1], q_rope.shape[-1], value.shape[-1])
    num_positions = value.shape[1]
    padding = -num_positions % TILE
    operands = tuple(_pad(x, padding) for x in (q_nope, q_rope, k_nope, k_rope, value))
    # Padded positions come last, so that no query sees them, and see only each other.
    segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padding)), constant_values=-1)
    out, largest = _attend((*operands, segments), scale, interpret)
    return out[:, :num_positions], jnp.max(largest[:, :, :num_positions], axis=2)


def _check_widths(nope: int, rope: int, value: int) -> None:
    if nope not in _WIDTHS or value != nope or rope != _ROPE_WIDTH:
        raise NotImplementedError(
            f"mla_attention: 'pallas_gpu' takes heads of {_WIDTHS[0]} or {_WIDTHS[1]} columns "
            f"without rotation, {_ROPE_WIDTH} with, and values as wide as without; got {nope}, "
            f"{rope} and {value}; choose 'auto' in compute.implementation"
        )


def _pad(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in x.shape[2:])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(operands: _Operands, scale: float, interpret: bool) -> tuple[Array, Array]:
    return _attend_forward(operands, scale, interpret)[0]


def _attend_forward(operands: _Operands, scale: float, interpret: bool):
    q_nope, q_rope, *of_keys = operands
    out, largest, log_sum = forward(q_nope, q_rope, Keys(*of_keys), scale, interpret)
    out = checkpoint_name(out, "attention_out")
    log_sum = checkpoint_name(log_sum, "attention_log_sum")
    return (out, largest), (operands, out, log_sum)


def _attend_backward(scale: float, interpret: bool, residuals, cotangents):
    (q_nope, q_rope, *of_keys), out, log_sum = residuals
    d_out, keys = cotangents[0], Keys(*of_keys)
    inner = jnp.einsum("btnu,btnu->bnt", out, d_out, preferred_element_type=F32)
    queries = Queries(q_nope, q_rope, d_out, keys.segments, log_sum * LOG2_E, inner)
    *d_wide, d_k_rope, d_value = backward(queries, keys, scale, interpret)
    return ((*d_wide, d_k_rope.astype(keys.rope.dtype), d_value, None),)


_attend.defvjp(_attend_forward, _attend_backward)
