"""Which numbers are kept in which format.

Master weights, optimizer moments and every sum that grows are float32. Matrix products run in the
compute dtype. Routing and softmax run in float32 whatever the compute dtype is, because ties decide
experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

MASTER = jnp.float32


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts every floating-point leaf to `dtype`, leaving integers and keys alone."""

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
