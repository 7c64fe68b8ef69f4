"""Weights rounded and written out, then multiplied in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import straight_through


def int4_fake_quant(
    x: Float[Array, "W K"], w: Float[Array, "K N"], group_size: int
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_fake_quant` describes."""
    rounded = int4.dequantize(int4.quantize(jax.lax.stop_gradient(w), group_size), x.dtype)
    values = straight_through(w, rounded).astype(jnp.float32)
    return (x.astype(jnp.float32) @ values).astype(x.dtype)
