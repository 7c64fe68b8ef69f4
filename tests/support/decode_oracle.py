"""Decoding in float64, and operands for it."""

import numpy as np

SCALE = 0.3


def decode_inputs(case):
    """Queries' latent and rotary parts and the cache's, in float64, and lengths."""
    rng = np.random.default_rng(0)
    batch = len(case.lengths)
    of_heads, of_cache = (batch, case.heads), (batch, case.positions)
    shapes = [(*lead, n) for lead in (of_heads, of_cache) for n in (case.latent, case.rope)]
    return [rng.standard_normal(shape) for shape in shapes], np.array(case.lengths)


def decode_oracle(q_latent, q_rope, latents, k_rope, lengths):
    """The output, sequence by sequence, in float64."""
    out = np.zeros_like(q_latent)
    for b, length in enumerate(lengths):
        if length > 0:
            c = latents[b, :length]
            logits = SCALE * (q_latent[b] @ c.T + q_rope[b] @ k_rope[b, :length].T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b] = weights @ c / weights.sum(axis=1, keepdims=True)
    return out
