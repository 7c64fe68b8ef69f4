"""Decoding in plain XLA: products in the operands' dtype, all logits of a query in memory."""

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
    logits = scale * (
        _product("bnc,bsc->bns", q_latent, latents) + _product("bnr,bsr->bns", q_rope, k_rope)
    )
    used = jnp.arange(latents.shape[1]) < lengths[:, None]
    weights = jax.nn.softmax(logits, axis=-1, where=used[:, None]).astype(latents.dtype)
    # Zero times what a cache holds behind its end might not be zero.
    values = jnp.where(used[..., None], latents, 0)
    return _product("bns,bsc->bnc", weights, values).astype(latents.dtype)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
