"""Causal attention of multi-head latent attention, with the largest logit of each head."""

import jax
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.checks import check_same_dtype, check_shapes
from kimi_jax.kernels.mla_attention import pallas_gpu, pallas_tpu, reference, xla, xla_accelerator
from kimi_jax.kernels.selection import select

_AVAILABLE = {
    Implementation.XLA: xla.mla_attention,
    Implementation.XLA_ACCELERATOR: xla_accelerator.mla_attention,
    Implementation.PALLAS_TPU: pallas_tpu.mla_attention,
    Implementation.PALLAS_GPU: pallas_gpu.mla_attention,
    Implementation.REFERENCE: reference.mla_attention,
}
_FASTEST = {
    "tpu": Implementation.PALLAS_TPU,
    "gpu": Implementation.XLA_ACCELERATOR,
}


@jax.named_scope("mla_attention")
def mla_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N R"],
    k_nope: Float[Array, "B T N H"],
    k_rope: Float[Array, "B T R"],
    value: Float[Array, "B T N U"],
    segments: Int[Array, "B T"],
    *,
    scale: float,
    implementation: Implementation = Implementation.AUTO,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N"]]:
    """Attends causally within documents; the rotary key is shared by all heads.

    logit[t, s] = scale * (q_nope[t] . k_nope[s] + q_rope[t] . k_rope[s]);
    out[t] = sum over s <= t with segments[s] == segments[t] of softmax(logit[t])[s] value[s].
    Softmax and sums are float32.

    Args:
      q_nope: queries without rotation.
      q_rope: rotated queries.
      k_nope: keys without rotation.
      k_rope: rotated keys.
      value: values.
      segments: document number of each position.
      scale: multiplier of the logits.
      implementation: which program computes it.

    Returns:
      The output in the values' dtype, and the largest unmasked logit of each sequence and head,
      float32, through which no gradient flows.

    Raises:
      ValueError: shapes do not fit, or dtypes differ.
      NotImplementedError: the named implementation does not exist.

    Source: arXiv 2405.04434, section 2.1; the maximum is what QK-clip needs (arXiv 2507.20534,
    section 2.1).
    """
    check_shapes(
        "mla_attention",
        {
            "q_nope": (q_nope, "B T N H"),
            "q_rope": (q_rope, "B T N R"),
            "k_nope": (k_nope, "B T N H"),
            "k_rope": (k_rope, "B T R"),
            "value": (value, "B T N U"),
            "segments": (segments, "B T"),
        },
    )
    check_same_dtype(
        "mla_attention",
        {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "value": value},
    )
    run = select("mla_attention", implementation, _AVAILABLE, _FASTEST)
    out, max_logit = run(q_nope, q_rope, k_nope, k_rope, value, segments, scale=scale)
    return out, jax.lax.stop_gradient(max_logit)


__all__ = ["mla_attention"]
