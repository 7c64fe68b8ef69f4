"""Random keys by name: `key_for(root, "dropout", step)`. No key is used twice."""

import zlib

import jax


def key_for(root: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Derives the key of a purpose from the run's root key.

    Args:
      root: a typed key, `jax.random.key(seed)`.
      *names: strings, and integers that may be traced, folded in from left to right.

    Returns:
      A key that differs for every sequence of names.
    """
    for name in names:
        number = zlib.crc32(name.encode()) if isinstance(name, str) else name
        root = jax.random.fold_in(root, number)
    return root
