"""Root mean square of updates: the quantity that lets Muon and AdamW share a learning rate."""

from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.core.param_spec import is_spec
from kimi_jax.core.trees import leaf_names


def update_rms(updates: Any, groups: Any) -> dict[str, jax.Array]:
    """Returns the root mean square over all values of each group.

    Args:
      updates: updates before learning rate and weight decay.
      groups: the name of its group for each leaf, such as the labels of
        `muon_clip.label_parameters` or the result of `role_names`.

    Returns:
      float32 scalars by group. Muon's are near `update_rms` (0.2), AdamW's in 0.2 .. 0.4 (arXiv
      2502.16982, section 2.2).
    """
    squares: dict[str, list[jax.Array]] = {}
    sizes: dict[str, int] = {}
    for leaf, group in zip(jax.tree.leaves(updates), jax.tree.leaves(groups), strict=True):
        squares.setdefault(group, []).append(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
        sizes[group] = sizes.get(group, 0) + leaf.size
    return {group: jnp.sqrt(sum(parts) / float(sizes[group])) for group, parts in squares.items()}


def role_names(plan: Any) -> Any:
    """Returns a tree with the role of each parameter: the last part of its name, `w_gate`."""
    names = leaf_names(plan, is_leaf=is_spec)
    return jax.tree.map(lambda name: name.rpartition(".")[2], names)
