"""Attention as its equation: every logit in memory, all in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mla_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B T N H"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T N U"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Computes what the package's `mla_attention` describes."""
    q_nope, q_rope, k_nope, k_rope, v = (
        x.astype(jnp.float32) for x in (q_nope, q_rope, k_nope, k_rope, value)
    )
    logits = scale * (
        jnp.einsum("btnh,bsnh->bnts", q_nope, k_nope) + jnp.einsum("btnr,bsr->bnts", q_rope, k_rope)
    )
    position = jnp.arange(value.shape[1])
    same_document = segments[:, :, None] == segments[:, None, :]
    visible = (position[:, None] >= position[None, :]) & same_document
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    out = jnp.einsum("bnts,bsnu->btnu", jax.nn.softmax(logits, axis=-1), v)
    return out.astype(value.dtype), jnp.max(logits, axis=(2, 3))
