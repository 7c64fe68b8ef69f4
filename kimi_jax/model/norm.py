"""RMSNorm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.core.param_spec import NORM, ParamSpec


def spec(width: int, axis: str) -> ParamSpec:
    """Plans a gain of the given width, initially 1."""
    return ParamSpec(
        shape=(width,), axes=(axis,), init=jax.nn.initializers.ones, tags=frozenset({NORM})
    )


@jax.named_scope("rms_norm")
def rms_norm(
    gain: Float[Array, "X"], x: Float[Array, "*shape X"], *, eps: float
) -> Float[Array, "*shape X"]:
    """Returns gain * x / sqrt(mean(x^2) + eps), computed in float32 and rounded to x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + eps) * gain).astype(x.dtype)
