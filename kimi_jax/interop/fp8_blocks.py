"""Weights in FP8 with a float32 scale for each block of 128 x 128: how K2 and DeepSeek-V3 came out.

A value is code * scale_inv[row // 128, column // 128]; blocks at the edges of a matrix may be
smaller. The side is 128 whatever the matrix is: 576 rows are four blocks and a half, not five of
116 rows.

Source: the released checkpoints; arXiv 2412.19437, section 3.3.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 128
CODE = ml_dtypes.float8_e4m3fn
_LARGEST = 448.0
_VALUES = np.arange(256, dtype=np.uint8).view(CODE).astype(np.float32)  # of each code
_SAMPLE = 16  # values of a block that are tried first
# Codes that can be the largest of a block: one binade of them. A block whose largest code lies
# lower has the values of another one with a smaller scale.
_LARGEST_CODES = np.array([448, 416, 384, 352, 320, 288, 256, 240], np.float32)


def num_blocks(size: int) -> int:
    """Blocks along a dimension."""
    return -(-size // BLOCK)


def dequantize(
    codes: np.ndarray, scales: np.ndarray, *, first_row: int = 0, first_column: int = 0
) -> np.ndarray:
    """Returns code * scale in float32.

    Args:
      codes: [rows, columns], a piece of a matrix.
      scales: those of the blocks that the piece touches.
      first_row: of the piece in the matrix.
      first_column: likewise.
    """
    values = _VALUES[codes.view(np.uint8)]
    rows = np.diff(_edges(first_row, codes.shape[0]))
    columns = np.diff(_edges(first_column, codes.shape[1]))
    values *= np.repeat(np.repeat(scales, columns, axis=1), rows, axis=0)
    return values


def _edges(first: int, size: int) -> np.ndarray:
    """Where blocks begin and end within a piece of a dimension."""
    inner = np.arange(BLOCK - first % BLOCK, size, BLOCK)
    return np.concatenate([[0], inner, [size]])


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix, or rows of it that begin with a block, to codes and scales.

    scale = max |w| / 448 over a block, code = round(w / scale), ties to even. Where another scale
    gives back every value of a block exactly, that one is taken: what came from FP8 returns to it
    without loss, whatever scales it had. A block of zeros has the scale 1.

    Args:
      values: [rows, columns], finite.

    Returns:
      Codes [rows, columns], and scales [blocks, blocks] in float32.
    """
    blocks = _to_blocks(np.asarray(values))
    largest = np.max(np.abs(blocks), axis=(-2, -1)).astype(np.float32)
    scales = np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        codes, exact = (np.array(a) for a in _round_blocks(blocks, scales))
    lossy = np.argwhere(~exact)
    candidates = _candidates(blocks[~exact], largest[~exact])
    for (i, j), possible in zip(lossy, candidates, strict=True):
        block = blocks[i, j].astype(np.float32)
        for scale in possible:
            if np.array_equal(_value(_codes(block, scale), scale), block):
                scales[i, j] = scale
                codes[i, j] = _codes(block, scale)
                break
    return _from_blocks(codes, values.shape), scales


@jax.jit
def _round_blocks(blocks: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the nearest codes, and which blocks they stand for exactly.

    Compiled, this takes a third of the time that NumPy's conversion takes.
    """
    values, scales = blocks.astype(jnp.float32), scales[..., None, None]
    codes = jnp.clip(values / scales, -_LARGEST, _LARGEST).astype(CODE)
    return codes, jnp.all(codes.astype(jnp.float32) * scales == values, axis=(-2, -1))


def _candidates(blocks: np.ndarray, largest: np.ndarray) -> list[np.ndarray]:
    """Returns for each block the scales with which some of its values are codes', exactly."""
    scales = largest / _LARGEST_CODES[:, None]
    # The product of a code and the scale was rounded to the largest value: the quotient may be a
    # neighbour of the scale.
    scales = np.concatenate([scales, np.nextafter(scales, 0), np.nextafter(scales, np.inf)])
    sample = blocks[:, :1, :_SAMPLE].astype(np.float32)
    fits = _value(_codes(sample, scales), scales) == sample
    return [column[chosen] for column, chosen in zip(scales.T, fits.all((-2, -1)).T, strict=True)]


def _codes(blocks: np.ndarray, scales: np.ndarray | np.float32) -> np.ndarray:
    quotients = blocks / np.asarray(scales)[..., None, None]
    return np.clip(quotients, -_LARGEST, _LARGEST).astype(CODE)


def _value(codes: np.ndarray, scales: np.ndarray | np.float32) -> np.ndarray:
    return _VALUES[codes.view(np.uint8)] * np.asarray(scales)[..., None, None]


def _to_blocks(values: np.ndarray) -> np.ndarray:
    """Cuts [rows, columns] into [blocks, blocks, 128, 128], filled up with zeros."""
    rows, columns = (num_blocks(size) for size in values.shape)
    missing = [(0, n * BLOCK - size) for n, size in zip((rows, columns), values.shape, strict=True)]
    padded = np.pad(values, missing) if any(after for _, after in missing) else values
    return padded.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)


def _from_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = blocks.shape[:2]
    joined = blocks.swapaxes(1, 2).reshape(rows * BLOCK, columns * BLOCK)
    return joined[: shape[0], : shape[1]]
