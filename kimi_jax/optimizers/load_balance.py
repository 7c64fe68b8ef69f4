"""Keeps experts equally busy by moving the router's selection biases; no gradient takes part."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def balance_selection_bias(
    bias: Float[Array, "L E"], load: Num[Array, "L E"], *, rate: float
) -> Float[Array, "L E"]:
    """Raises the bias of under-used experts and lowers that of over-used ones.

    b <- b + u (sign(e) - mean(sign(e))),  e_i = mean(load) - load_i, each layer for itself. The
    mean keeps the biases from drifting together.

    Args:
      bias: b, added to the router's scores for selection only.
      load: assignments each expert received in this step, over the whole batch.
      rate: u, 1e-3 in Moonlight.

    Returns:
      The biases of the next step.

    Source: arXiv 2502.16982, section 3.3.
    """
    load = load.astype(jnp.float32)
    direction = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    return bias + rate * (direction - jnp.mean(direction, axis=-1, keepdims=True))


def max_violation(load: Num[Array, "L E"]) -> Float[Array, " L"]:
    """Returns max(load) / mean(load) - 1 per layer: 0 when balanced, E - 1 when one gets all."""
    load = load.astype(jnp.float32)
    return jnp.max(load, axis=-1) / jnp.mean(load, axis=-1) - 1.0
