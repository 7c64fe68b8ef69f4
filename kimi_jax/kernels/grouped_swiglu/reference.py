"""Every expert applied to every token, in float32, and the chosen ones summed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.configs.compute import ResidualFormat


def grouped_swiglu(
    x: Float[Array, "W D"],
    w_gate: Float[Array, "E D M"],
    w_up: Float[Array, "E D M"],
    w_down: Float[Array, "E M D"],
    expert_ids: Int[Array, "W K"],
    weights: Float[Array, "W K"],
    residuals: ResidualFormat,
) -> Float[Array, "W D"]:
    """Computes what the package's `grouped_swiglu` describes, with JAX's own backward pass."""
    if residuals is not ResidualFormat.COMPUTE:
        raise NotImplementedError(
            f"grouped_swiglu's 'reference' keeps nothing in {residuals.value!r}; choose another "
            "compute.implementation, or 'compute' in compute.feed_forward_residuals"
        )
    tokens, gate, up, down = (a.astype(jnp.float32) for a in (x, w_gate, w_up, w_down))
    chosen = expert_ids[:, :, None] == jnp.arange(w_gate.shape[0])
    combine = jnp.sum(jnp.where(chosen, weights[:, :, None].astype(jnp.float32), 0.0), axis=1)
    hidden = jax.nn.silu(jnp.einsum("wd,edm->wem", tokens, gate))
    hidden = hidden * jnp.einsum("wd,edm->wem", tokens, up)
    return jnp.einsum("wem,emd,we->wd", hidden, down, combine).astype(x.dtype)
