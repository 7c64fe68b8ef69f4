"""Small functions over pytrees that JAX does not have."""

from collections.abc import Callable
from typing import Any

import jax


def leaf_names(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Returns a tree of the same structure whose leaves are their own dotted paths."""

    def name(path, _):
        return jax.tree_util.keystr(path, simple=True, separator=".")

    return jax.tree.map_with_path(name, tree, is_leaf=is_leaf)
