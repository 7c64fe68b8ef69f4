"""The product with a weight rounded to four bits on TPUs: the rounded weight stays in VMEM.

Grid, blocks and invariant: `kernels.stationary`; each weight is rounded once. Bytes: those of a
product with the weight as it is. Rounding takes 43 vector instructions for each 32 x 128 weights,
which on v6e is as long as the matrix unit takes for 700 rows of x.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.core.param_spec import Leaf
from kimi_jax.core.platform import target_chip
from kimi_jax.kernels import stationary, tpu
from kimi_jax.kernels.products import dot
from kimi_jax.kernels.stationary import Tiles, Weight
from kimi_jax.kernels.tpu import BFLOAT16_ROWS
from kimi_jax.quantization.int4 import LARGEST_CODE, SMALLEST_SCALE

# float32 numbers between 2^23 and 2^24 are the integers, those between 2^11 and 2^12 the multiples
# of 2^-12. Adding and subtracting 1.5 times the lower end rounds to them, ties to even.
_INTEGERS = 1.5 * 2.0**23
_TIE_GRID = 1.5 * 2.0**11


def int4_fake_quant(
    x: Float[Array, "W K"],
    w: Float[Array, "K N"],
    group_size: int,
    *,
    tiles: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "W N"]:
    """Computes what the package's `int4_fake_quant` describes.

    Args:
      x: activations.
      w: weights.
      group_size: weights along K that share a scale.
      tiles: rows and outputs of a tile; otherwise the chip's table or a rule says.
      interpret: runs on any platform, slowly.
    """
    return _int4_fake_quant(x, w, group_size, None if tiles is None else Tiles(**tiles), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _int4_fake_quant(
    x: Array, w: Array, group_size: int, tiles: Tiles | None, interpret: bool
) -> Array:
    rounded = weight(w.astype(jnp.bfloat16), group_size, interpret=interpret)
    return stationary.multiply(x, rounded, transposed=False, tiles=tiles, interpret=interpret)


def _forward(x: Array, w: Array, group_size: int, tiles: Tiles | None, interpret: bool):
    return _int4_fake_quant(x, w, group_size, tiles, interpret), (x, w)


def _backward(group_size: int, tiles: Tiles | None, interpret: bool, residuals, d_y: Array):
    del tiles  # of the forward product
    x, w = residuals
    rounded = weight(w.astype(jnp.bfloat16), group_size, interpret=interpret)
    d_x = stationary.multiply(d_y, rounded, transposed=True, tiles=None, interpret=interpret)
    return d_x, dot(x, d_y, 0, 0).astype(w.dtype)


_int4_fake_quant.defvjp(_forward, _backward)


def weight(w: Leaf, group_size: int, *, interpret: bool = False) -> Weight:
    """Returns the weight as it is made from w, in bfloat16; also by shape and dtype alone."""
    return Weight(
        name="int4_fake_quant",
        stored=(w,),
        zeros=(0,),
        inputs=w.shape[0],
        group_size=group_size,
        make=functools.partial(_round, group_size=group_size, interpret=interpret),
    )


def _round(w: Array, dtype: Any, *, group_size: int, interpret: bool) -> Array:
    """Quantises and dequantises [rows, columns] in bfloat16, groups along the rows."""
    groups = w.reshape(-1, group_size, w.shape[1])
    # 1 / 7 in float32 instead of a division: no bfloat16 number is so near to seven times the
    # middle between two others that it rounds differently.
    scales = jnp.maximum(_largest(groups) * (1 / LARGEST_CODE), SMALLEST_SCALE)
    scales = jax.lax.reduce_precision(scales, exponent_bits=8, mantissa_bits=7)[:, None]
    codes = _nearest_codes(groups.astype(jnp.float32) * (1 / scales), interpret)
    return (codes * scales).astype(dtype).reshape(w.shape)


def _largest(groups: Array) -> Array:
    """Returns max |w| of each group, in float32."""
    if not tpu.facts(target_chip()).bfloat16_vectors or groups.shape[1] % BFLOAT16_ROWS:
        return jnp.max(jnp.abs(groups.astype(jnp.float32)), axis=1)
    count, size, columns = groups.shape
    vectors = jnp.abs(groups.reshape(count, size // BFLOAT16_ROWS, BFLOAT16_ROWS, columns))
    largest = functools.reduce(jnp.maximum, (vectors[:, i] for i in range(vectors.shape[1])))
    return jnp.max(largest.astype(jnp.float32), axis=1)


def _nearest_codes(quotients: Array, interpret: bool) -> Array:
    """Rounds to integers as `int4.nearest_codes` does, whatever the reciprocal's last bits are.

    Codes beyond 7 cannot come up. XLA, which interprets, would cancel the additions.
    """
    if interpret:
        return jnp.round(jnp.round(quotients * 2.0**12) * 2.0**-12)
    return ((quotients + _TIE_GRID) + (_INTEGERS - _TIE_GRID)) - _INTEGERS
