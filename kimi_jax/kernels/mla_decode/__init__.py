"""Decoding with multi-head latent attention: one query against a cache of latents."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.checks import check_same_dtype, check_shapes
from kimi_jax.kernels.mla_decode import pallas_gpu, pallas_tpu, reference, xla
from kimi_jax.kernels.selection import select

_AVAILABLE = {
    Implementation.XLA: xla.mla_decode,
    Implementation.PALLAS_TPU: pallas_tpu.mla_decode,
    Implementation.PALLAS_GPU: pallas_gpu.mla_decode,
    Implementation.REFERENCE: reference.mla_decode,
}
_FASTEST = {
    "tpu": Implementation.PALLAS_TPU,
}


@jax.named_scope("mla_decode")
def mla_decode(
    q_latent: Float[Array, "B N C"],
    q_rope: Float[Array, "B N R"],
    latents: Float[Array, "B S C"],
    k_rope: Float[Array, "B S R"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    implementation: Implementation = Implementation.AUTO,
) -> Float[Array, "B N C"]:
    """Attends from one position of each sequence, in the absorbed form.

    logit[n, s] = scale * (q_latent[n] . latents[s] + q_rope[n] . k_rope[s]);
    out[n] = sum over s < length of softmax(logit[n])[s] latents[s].
    Softmax and sums are float32. Keys and values of the heads are never made: w_k_nope is part of
    q_latent, and w_value is applied to the output.

    For inference only.

    Args:
      q_latent: queries times the up-projection of keys, q_nope[n] . w_k_nope[c, n].
      q_rope: rotated queries.
      latents: normalised latents of the positions so far.
      k_rope: their rotated keys, shared by all heads.
      lengths: number of positions that each sequence has, the query's own included; 0 to S. What
        lies behind is not used. A length of 0 gives zeros.
      scale: multiplier of the logits.
      implementation: which program computes it.

    Returns:
      Weighted latents, in the latents' dtype.

    Raises:
      ValueError: shapes do not fit, or dtypes differ.
      NotImplementedError: the named implementation does not exist, or a gradient is asked for.

    Source: arXiv 2405.04434, section 2.1.3 and appendix C.
    """
    check_shapes(
        "mla_decode",
        {
            "q_latent": (q_latent, "B N C"),
            "q_rope": (q_rope, "B N R"),
            "latents": (latents, "B S C"),
            "k_rope": (k_rope, "B S R"),
            "lengths": (lengths, "B"),
        },
    )
    check_same_dtype(
        "mla_decode",
        {"q_latent": q_latent, "q_rope": q_rope, "latents": latents, "k_rope": k_rope},
    )
    run = functools.partial(select("mla_decode", implementation, _AVAILABLE, _FASTEST), scale=scale)
    return _without_gradient(run, q_latent, q_rope, latents, k_rope, lengths)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_gradient(run: Callable[..., Array], *operands: Array) -> Array:
    return run(*operands)


@_without_gradient.defjvp
def _raise(run: Callable[..., Array], primals, tangents):
    del run, primals, tangents
    raise NotImplementedError(
        "mla_decode has no gradient: it decodes from a cache; differentiate mla_attention instead"
    )


__all__ = ["mla_decode"]
