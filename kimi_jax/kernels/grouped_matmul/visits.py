"""In which order a kernel meets tiles of rows and the groups that own rows of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """One entry for each visit of a tile by a group, in row order; each int32 [visits].

    Visits of one group follow each other, and so do visits of one tile. Entries that are left over
    repeat the last group and the last tile and own no rows.
    """

    group: Array  # whose matrix is used; where no row is owned, that of the visit before
    source: Array  # tile of rows that is read; where no row is owned, that of the visit before
    target: Array  # tile of rows that is written
    begin: Array  # first row of the tile that the group owns
    end: Array  # first one after them; equal to `begin` where no row is owned


def by_tile(group_sizes: Int[Array, "E"], num_rows: int, tile_rows: int) -> Visits:
    """Visits every tile at least once: those without any group's rows, too, after all others."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    index = jnp.arange(len(group_sizes), dtype=jnp.int32)
    last_group = jnp.max(jnp.where(group_sizes > 0, index, 0))
    num_tiles = -(-num_rows // tile_rows)
    first_spare = -(-ends[-1:] // tile_rows)
    counts = jnp.append(_tiles_of_groups(group_sizes, ends, tile_rows), num_tiles - first_spare)
    first = jnp.append((ends - group_sizes) // tile_rows, first_spare)
    return _visits(group_sizes, num_rows, tile_rows, counts, first, last_group)


def by_group(group_sizes: Int[Array, "E"], num_rows: int, tile_rows: int) -> Visits:
    """Visits tiles for every group, and one for a group without rows; a tile without them never."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    counts = jnp.maximum(_tiles_of_groups(group_sizes, ends, tile_rows), 1)
    first = (ends - group_sizes) // tile_rows
    return _visits(group_sizes, num_rows, tile_rows, counts, first, len(group_sizes) - 1)


def _tiles_of_groups(group_sizes: Array, ends: Array, tile_rows: int) -> Array:
    touched = -(-ends // tile_rows) - (ends - group_sizes) // tile_rows
    return jnp.where(group_sizes > 0, touched, 0)


def _visits(
    group_sizes: Array, num_rows: int, tile_rows: int, counts: Array, first: Array, last_group
) -> Visits:
    """Lists visits, given how many tiles each owner has and which one is its first."""
    num_tiles = -(-num_rows // tile_rows)
    stop = jnp.cumsum(counts, dtype=jnp.int32)
    visit = jnp.arange(num_tiles + len(group_sizes), dtype=jnp.int32)
    # A comparison with every group: a binary search is a loop, which costs more.
    owner = jnp.sum(visit[:, None] >= stop[None, :], axis=1, dtype=jnp.int32)
    known = jnp.minimum(owner, len(counts) - 1)
    tile = (first[known] + visit - (stop - counts)[known]).astype(jnp.int32)
    group = jnp.minimum(owner, last_group).astype(jnp.int32)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begin = jnp.clip((ends - group_sizes)[group] - tile * tile_rows, 0, tile_rows)
    end = jnp.clip(ends[group] - tile * tile_rows, 0, tile_rows)
    return Visits(
        group=group,
        source=jnp.minimum(tile, jnp.maximum(ends[-1] - 1, 0) // tile_rows),
        target=jnp.minimum(tile, num_tiles - 1),
        begin=jnp.where(end > begin, begin, 0).astype(jnp.int32),
        end=jnp.where(end > begin, end, 0).astype(jnp.int32),
    )
