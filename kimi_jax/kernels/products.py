"""Matrix products as every kernel wants them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Multiplies two matrices along the given dimensions, summing in float32."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
