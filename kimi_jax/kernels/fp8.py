"""Activations stored in eight bits until the backward pass needs them; nothing computes in them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

# Values along the last axis that share one scale. Source: arXiv 2507.20534, section 2.4.
TILE = 128

_CODE = jnp.float8_e4m3fn
_LARGEST_CODE = 448.0  # of E4M3 without infinities
_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)


def quantize_tiles(
    x: Float[Array, "*shape D"],
) -> tuple[Float[Array, "*shape D"], Float[Array, "*shape tiles"]]:
    """Writes x as FP8-E4M3 codes with one float32 scale for each 1 x 128 tile.

    s = max |x| / 448 over the tile; c = round(x / s), ties to even. The error of a value is at most
    max(2^-4 |x|, 2^-10 s), hence below 2^-4 max |x|, and values of the grid 448 s, ..., 0 come back
    as they were.

    Args:
      x: any width; the last tile may be shorter.

    Returns:
      Codes, float8_e4m3fn, and scales, ceil(D / 128) of them. A tile of zeros has the scale 1, as
      has one whose s is no normal float32: it comes back as zeros. A tile with a value that is not
      finite comes back as NaN throughout.

    Source: arXiv 2507.20534, section 2.4.
    """
    tiles = _to_tiles(x.astype(jnp.float32))
    scales = jnp.max(jnp.abs(tiles), axis=-1) / _LARGEST_CODE
    scales = jnp.where(scales < _SMALLEST_SCALE, 1.0, scales)
    codes = (tiles / scales[..., None]).astype(_CODE)
    return _from_tiles(codes, x.shape[-1]), scales


def dequantize_tiles(
    codes: Float[Array, "*shape D"], scales: Float[Array, "*shape tiles"], dtype: Any
) -> Float[Array, "*shape D"]:
    """Returns c s, multiplied in float32 and rounded to `dtype`; undoes `quantize_tiles`."""
    tiles = _to_tiles(codes).astype(jnp.float32) * scales[..., None]
    return _from_tiles(tiles.astype(dtype), codes.shape[-1])


def _to_tiles(x: Array) -> Array:
    """Reshapes [..., D] to [..., tiles, 128], the last tile filled up with zeros."""
    padding = -x.shape[-1] % TILE
    padded = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, padding)))
    return padded.reshape(*x.shape[:-1], -1, TILE)


def _from_tiles(tiles: Array, width: int) -> Array:
    """Undoes `_to_tiles`."""
    return tiles.reshape(*tiles.shape[:-2], -1)[..., :width]
