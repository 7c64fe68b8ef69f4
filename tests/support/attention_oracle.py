"""Attention and its gradients in float64, and operands for it."""

import numpy as np

SCALE = 0.3


def visible_pairs(segments):
    """Which query sees which key, [B, 1, T, S]."""
    position = np.arange(segments.shape[1])
    causal = position[:, None] >= position[None, :]
    return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]


def attention_oracle(q_nope, q_rope, k_nope, k_rope, value, segments, d_out):
    """The output, the largest logits, and the five gradients: naive, in float64."""
    k_rope_of_heads = np.repeat(k_rope[:, :, None], q_nope.shape[2], axis=2)
    q, k = np.concatenate([q_nope, q_rope], -1), np.concatenate([k_nope, k_rope_of_heads], -1)
    logits = SCALE * np.einsum("btnd,bsnd->bnts", q, k)
    logits = np.where(visible_pairs(segments), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnu->btnu", p, value)
    d_p = np.einsum("btnu,bsnu->bnts", d_out, value)
    d_logits = SCALE * p * (d_p - np.sum(p * d_p, -1, keepdims=True))
    d_q = np.einsum("bnts,bsnd->btnd", d_logits, k)
    d_k = np.einsum("bnts,btnd->bsnd", d_logits, q)
    d_value = np.einsum("bnts,btnu->bsnu", p, d_out)
    width = q_nope.shape[-1]
    gradients = (
        *(d_q[..., :width], d_q[..., width:]),
        *(d_k[..., :width], d_k[..., width:].sum(axis=2), d_value),
    )
    return out, logits.max((2, 3)), gradients


def attention_inputs(case):
    """The five operands in float64, segments, and a cotangent of the output."""
    rng = np.random.default_rng(0)
    of_heads = (case.batch, case.positions, case.heads)
    shapes = [
        *((*of_heads, case.nope), (*of_heads, case.rope), (*of_heads, case.nope)),
        *((case.batch, case.positions, case.rope), (*of_heads, case.value)),
    ]
    operands = [rng.standard_normal(shape) for shape in shapes]
    # Documents end at other places in each sequence, and not at blocks.
    ends = np.sort(rng.integers(0, case.positions, (case.batch, 1, case.documents - 1)))
    segments = np.sum(np.arange(case.positions)[:, None] >= ends, axis=2)
    return operands, segments, rng.standard_normal((*of_heads, case.value))
