"""A matrix for every row, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.quantization.fake_quant import Weight, dense


def grouped_matmul(
    x: Float[Array, "A K"], w: Weight, group_sizes: Int[Array, "E"]
) -> Float[Array, "A N"]:
    """Computes what the package's `grouped_matmul` describes."""
    last = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    member = ((row < last) & (row >= last - group_sizes)).astype(jnp.float32)
    rows, matrices = x.astype(jnp.float32), dense(w, x.dtype).astype(jnp.float32)
    return jnp.einsum("ae,ak,ekn->an", member, rows, matrices).astype(x.dtype)
