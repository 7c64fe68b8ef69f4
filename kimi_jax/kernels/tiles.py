"""Cuts rows sorted by group into tiles, so that work follows the rows that exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Tiles(NamedTuple):
    """Tiles in row order, each inside one group; those from `count` on are empty.

    Reading a tile whole takes rows of the next one with it, and past the last row: an array of rows
    needs `tile_rows` spare ones. Writing tiles whole and in order is right, since the next one
    overwrites what was not its own.
    """

    count: Array  # [], number of tiles with rows
    group: Array  # [tiles]
    start: Array  # [tiles], first row; for an empty tile, the number of rows
    size: Array  # [tiles], number of rows that belong to the tile
    continues: Array  # [tiles], whether the tile before is of the same group


def cut(group_sizes: Int[Array, "E"], num_rows: int, tile_rows: int, multiple: int) -> Tiles:
    """Cuts each group into tiles of `tile_rows` rows, the last of a group shorter.

    Args:
      group_sizes: rows of each group, in order; their sum is at most `num_rows`.
      num_rows: length of the array of rows.
      tile_rows: longest tile.
      multiple: the length of the returned arrays is a multiple of this.
    """
    num_groups = group_sizes.shape[0]
    num_tiles = min(num_rows, num_rows // tile_rows + num_groups)
    num_tiles += -num_tiles % multiple
    tiles_of_group = -(-group_sizes // tile_rows)
    last_tile = jnp.cumsum(tiles_of_group)
    index = jnp.arange(num_tiles, dtype=group_sizes.dtype)
    # A comparison with every group: a binary search is a loop, which costs more.
    group = jnp.sum(index[:, None] >= last_tile[None, :], axis=1, dtype=group_sizes.dtype)
    exists = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    within = (index - (last_tile - tiles_of_group)[group]) * tile_rows
    start = (jnp.cumsum(group_sizes) - group_sizes)[group] + within
    size = jnp.minimum(group_sizes[group] - within, tile_rows)
    return Tiles(
        count=last_tile[-1],
        group=group,
        start=jnp.where(exists, start, num_rows),
        size=jnp.where(exists, size, 0),
        continues=(index > 0) & (group == jnp.roll(group, 1)),
    )


def take(x: Array, start: Array, size: int) -> Array:
    """Returns rows start : start + size."""
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def put(x: Array, rows: Array, start: Array) -> Array:
    """Replaces rows from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis=0)


def put_group(x: Array, part: Array, group: Array) -> Array:
    """Replaces x[group]."""
    return jax.lax.dynamic_update_index_in_dim(x, part, group, axis=0)
