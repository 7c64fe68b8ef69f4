"""The product with INT4 weights on TPUs: codes are unpacked and scaled in VMEM, once.

Grid, blocks and invariant: `kernels.stationary`. Bytes: 4.5 bits for a weight, with its share of a
scale.
"""

import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from kimi_jax.kernels import stationary, tpu_int4
from kimi_jax.kernels.stationary import Tiles, Weight
from kimi_jax.quantization.int4 import ZERO_WORD, Int4Weight


def int4_matmul(
    x: Float[Array, "W K"],
    w: Int4Weight,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_matmul` describes.

    Args:
      x: activations.
      w: one matrix.
      tiles: rows and outputs of a tile; otherwise the chip's table or a rule says.
      interpret: runs on any platform, slowly.
    """
    return _int4_matmul(x, w, None if tiles is None else Tiles(**tiles), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _int4_matmul(x: Array, w: Int4Weight, tiles: Tiles | None, interpret: bool) -> Array:
    return stationary.multiply(x, weight(w), transposed=False, tiles=tiles, interpret=interpret)


def _forward(x: Array, w: Int4Weight, tiles: Tiles | None, interpret: bool):
    return _int4_matmul(x, w, tiles, interpret), w


def _backward(tiles: Tiles | None, interpret: bool, w: Int4Weight, d_y: Array):
    del tiles  # of the forward product
    d_x = stationary.multiply(d_y, weight(w), transposed=True, tiles=None, interpret=interpret)
    return d_x, None


_int4_matmul.defvjp(_forward, _backward)


def weight(w: Int4Weight) -> Weight:
    """Returns the weight as it is made from codes and scales; also by their shapes and dtypes."""
    return Weight(
        name="int4_matmul",
        stored=(w.codes, w.scales),
        zeros=(ZERO_WORD, 0),
        inputs=w.shape[0],
        group_size=w.group_size,
        make=tpu_int4.dequantize,
    )
