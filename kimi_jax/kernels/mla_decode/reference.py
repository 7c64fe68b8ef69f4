"""Decoding as its equation, all in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mla_decode(
    q_latent: Float[Array, "B N C"],
    q_rope: Float[Array, "B N R"],
    latents: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
) -> Float[Array, "B N C"]:
    """Computes what the package's `mla_decode` describes."""
    q_latent, q_rope, c, k_rope = (
        x.astype(jnp.float32) for x in (q_latent, q_rope, latents, k_rope)
    )
    logits = scale * (
        jnp.einsum("bnc,bsc->bns", q_latent, c) + jnp.einsum("bnr,bsr->bns", q_rope, k_rope)
    )
    used = jnp.arange(c.shape[1]) < lengths[:, None]
    weights = jax.nn.softmax(logits, axis=-1, where=used[:, None])
    return jnp.einsum("bns,bsc->bnc", weights, jnp.where(used[..., None], c, 0.0)).astype(
        latents.dtype
    )
