"""What a forward pass keeps for the backward pass, and in which format it waits there."""

from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.kernels.fp8 import dequantize_tiles, quantize_tiles

Kept = tuple[Array, ...]  # the values, or codes and scales


def keep(x: Float[Array, "*shape D"], name: str, residuals: ResidualFormat) -> Kept:
    """Returns what is kept of x, for the forward rule of a `custom_vjp` to return.

    Args:
      x: what the backward pass will read.
      name: by which a remat policy keeps it, whatever the format.
      residuals: the format.
    """
    kept = quantize_tiles(x) if residuals is ResidualFormat.FP8 else (x,)
    return checkpoint_name(kept, name)


def restore(kept: Kept, dtype: Any, residuals: ResidualFormat) -> Float[Array, "*shape D"]:
    """Undoes `keep`: x itself, or what is left of it in FP8, rounded to `dtype`."""
    if residuals is ResidualFormat.FP8:
        return dequantize_tiles(*kept, dtype)
    return kept[0]
