"""Activations stored in eight bits until the backward pass needs them; nothing computes in them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

# Values along the last axis that share one scale. Source: arXiv 2507.20534, section 2.4.
TILE = 128

_CODE = jnp.float8_e4m3fn
_LARGEST_CODE = 448.0  # of E4M3 without infinities
_SMALLEST_SCALE = float(jnp.finfo(jnp.float32).tiny)
# TPUs store rows in pieces of 8 x 128 values. Cut into the same pieces they are read where they
# lie; cut into [rows, tiles, 128] they are copied as float32 before, which takes three times as
# long.
_PIECE_ROWS = 8


def quantize_tiles(
    x: Float[Array, "*shape D"],
) -> tuple[Float[Array, "*shape D"], Float[Array, "scales"]]:
    """Writes x as FP8-E4M3 codes with one float32 scale for each 1 x 128 tile.

    s = max |x| / 448 over the tile; c = round(x / s), ties to even. The error of a value is at most
    max(2^-4 |x|, 2^-10 s), hence below 2^-4 max |x|, and values of the grid 448 s, ..., 0 come back
    as they were.

    Args:
      x: any width; the last tile may be shorter.

    Returns:
      Codes, float8_e4m3fn, and scales: those of all rows' first tiles, then of their second, and
      so on. They have one dimension because TPUs fill a short one of several up to 128. A tile of
      zeros has the scale 1, as has one whose s is no normal float32: it comes back as zeros. A tile
      with a value that is not finite comes back as NaN throughout.

    Source: arXiv 2507.20534, section 2.4.
    """
    rows = x.reshape(-1, x.shape[-1])
    pieces = _to_pieces(rows, TILE).astype(jnp.float32)
    scales = jnp.max(jnp.abs(pieces), axis=-1, keepdims=True) / _LARGEST_CODE
    scales = jnp.where(scales < _SMALLEST_SCALE, 1.0, scales)
    codes = _from_pieces((pieces / scales).astype(_CODE), rows.shape)
    by_row = _from_pieces(scales, (rows.shape[0], scales.shape[1]))
    return codes.reshape(x.shape), by_row.T.reshape(-1)


def dequantize_tiles(
    codes: Float[Array, "*shape D"], scales: Float[Array, "scales"], dtype: Any
) -> Float[Array, "*shape D"]:
    """Returns c s, multiplied in float32 and rounded to `dtype`; undoes `quantize_tiles`."""
    rows = codes.reshape(-1, codes.shape[-1])
    by_row = scales.reshape(-1, rows.shape[0]).T
    values = _to_pieces(rows, TILE).astype(jnp.float32) * _to_pieces(by_row, 1)
    return _from_pieces(values.astype(dtype), rows.shape).reshape(codes.shape)


def _to_pieces(rows: Array, width: int) -> Array:
    """Cuts [W, D] into [pieces, tiles, 8, width], filled up with zeros."""
    missing = [(0, -rows.shape[0] % _PIECE_ROWS), (0, -rows.shape[1] % width)]
    padded = jnp.pad(rows, missing)
    pieces = padded.reshape(padded.shape[0] // _PIECE_ROWS, _PIECE_ROWS, -1, width)
    return pieces.swapaxes(1, 2)


def _from_pieces(pieces: Array, shape: tuple[int, int]) -> Array:
    """Undoes `_to_pieces`."""
    count, tiles, rows, width = pieces.shape
    padded = pieces.swapaxes(1, 2).reshape(count * rows, tiles * width)
    return padded[: shape[0], : shape[1]]
