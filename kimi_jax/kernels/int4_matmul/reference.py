"""Weights written out, then multiplied in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.quantization import int4
from kimi_jax.quantization.int4 import Int4Weight


def int4_matmul(x: Float[Array, "W K"], w: Int4Weight) -> Float[Array, "W N"]:
    """Computes what the package's `int4_matmul` describes."""
    values = jax.lax.stop_gradient(int4.dequantize(w, x.dtype)).astype(jnp.float32)
    return (x.astype(jnp.float32) @ values).astype(x.dtype)
