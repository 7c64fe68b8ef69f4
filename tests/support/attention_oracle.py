"""Attention and its gradients in float64, and operands for it."""

import jax.numpy as jnp
import numpy as np

from tests.support.gradients import value_and_gradients

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


def inputs_with_negative_logits(case):
    """Operands of which every logit is below -1, and segments."""
    (q_nope, q_rope, k_nope, k_rope, value), segments, _ = attention_inputs(case)
    return (1.0 + np.abs(q_nope), 0.0 * q_rope, -1.0 - np.abs(k_nope), k_rope, value), segments


def inputs_with_larger_hidden_logits(case):
    """Operands, segments, and the largest logits [B, N] of all pairs, by 10 above visible ones."""
    (q_nope, q_rope, k_nope, k_rope, value), segments, _ = attention_inputs(case)
    # Keys that only their own query sees match all others a hundredfold.
    visible = visible_pairs(segments)[:, 0]
    hidden_from = ~visible.any(axis=1, where=~np.eye(visible.shape[1], dtype=bool))
    k_nope = np.where(hidden_from[:, :, None, None], 100.0 * k_nope, k_nope)
    largest = SCALE * np.einsum("btnh,bsnh->bnts", q_nope, k_nope).max((2, 3))
    return (q_nope, q_rope, k_nope, k_rope, value), segments, largest


def run_attention(attend, operands, segments, d_out, dtype):
    """Returns what `attend(*operands, segments)` returns, and the gradients of the operands."""
    # The maximum's cotangent is not zero: it has to be ignored.
    d_max = jnp.ones((d_out.shape[0], d_out.shape[2]))
    (out, max_logit), gradients = value_and_gradients(
        attend,
        tuple(jnp.asarray(a, dtype) for a in operands),
        (jnp.asarray(d_out, dtype), d_max),
        fixed=(jnp.asarray(segments, jnp.int32),),
    )
    return out, max_logit, gradients
