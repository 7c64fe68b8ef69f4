"""QK-clip: shrinks the query and key weights of heads whose attention logits grew too large."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kimi_jax.core import axes as ax
from kimi_jax.core import param_spec
from kimi_jax.core.param_spec import ParamSpec

# A head's logit is q_nope . k_nope + q_rope . k_rope. The rotary key belongs to all heads, so the
# rotary query carries the whole factor and the other two carry its root each.
_POWERS = {param_spec.QUERY_NOPE: 0.5, param_spec.KEY_NOPE: 0.5, param_spec.QUERY_ROPE: 1.0}


def qk_clip(params: Any, plan: Any, max_logit: Float[Array, "L N"], *, threshold: float) -> Any:
    """Scales the logits of each head that exceeded the threshold back to it.

    gamma = tau / max_logit where max_logit > tau, else 1; query_nope and key_nope take
    sqrt(gamma), query_rope takes gamma. Runs after the optimizer's step, on updated weights.

    Args:
      params: one stack of blocks, or any part of it.
      plan: its specs, with the axes `layers` and `heads` on the leaves to be clipped.
      max_logit: largest logit (after the softmax scale, before the softmax) of each layer and head
        over the whole batch of the step; may be negative or -inf.
      threshold: tau, 100 in K2.

    Returns:
      The clipped parameters; heads at or below tau keep every bit.

    Source: arXiv 2507.20534, section 2.1 and algorithm 1.
    """
    clipped = clipped_heads(max_logit, threshold=threshold)
    # The inner where keeps the quotient away from zero and negative maxima, which are not clipped.
    gamma = jnp.where(clipped, threshold / jnp.where(clipped, max_logit, threshold), 1.0)
    factors = {tag: gamma if power == 1.0 else jnp.sqrt(gamma) for tag, power in _POWERS.items()}

    def clip(spec: ParamSpec, leaf: Array) -> Array:
        tags = spec.tags & factors.keys()
        if not tags:
            return leaf
        (tag,) = tags
        return leaf * _along_heads(factors[tag], spec).astype(leaf.dtype)

    return param_spec.map_specs(clip, plan, params)


def clipped_heads(max_logit: Float[Array, "L N"], *, threshold: float) -> Bool[Array, "L N"]:
    """Says which heads of which layers `qk_clip` scales."""
    return max_logit > threshold


def _along_heads(factor: Array, spec: ParamSpec) -> Array:
    """Reshapes [L, N] so that it broadcasts along the axes `layers` and `heads` of a leaf."""
    assert spec.axes.index(ax.LAYERS) < spec.axes.index(ax.HEADS), spec.axes
    kept = (ax.LAYERS, ax.HEADS)
    return jnp.expand_dims(factor, [i for i, axis in enumerate(spec.axes) if axis not in kept])
