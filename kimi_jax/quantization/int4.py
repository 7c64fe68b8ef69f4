"""Weights of four bits with a scale for each group: how K2's routed experts are released.

Symmetric, codes -7 to 7, groups of 32 along a matrix's inputs, scales in bfloat16. With
scale = absmax / 7 the largest weight of a group is on the grid, so that what was quantised once is
quantised to itself. The layout is that of compressed-tensors' `pack-quantized` (`weight_packed`,
`weight_scale`), transposed, since matrices here are [inputs, outputs].

Source: the checkpoints of Kimi K2 Thinking; the rule absmax / 7 and the smallest scale are those of
the open reproductions of their training.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from kimi_jax.core.param_spec import Leaf

GROUP_SIZE = 32  # released checkpoints
LARGEST_CODE = 7
SMALLEST_SCALE = 1e-5
CODES_PER_WORD = 8
ZERO_WORD = -0x77777778  # 0x88888888: eight codes of 0
_OFFSET = 8  # a nibble holds code + 8
_BITS = 4
_TIE_GRID = 2.0**12


@struct.dataclass
class Int4Weight:
    """A stack of matrices [..., K, N] in four bits; stands where the weight stood."""

    codes: Leaf  # int32 [..., K / 8, N]: the lowest nibble of word k holds weight 8 k
    scales: Leaf  # bfloat16 [..., K / G, N]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        *stacked, words, outputs = self.codes.shape
        return (*stacked, words * CODES_PER_WORD, outputs)

    @property
    def ndim(self) -> int:
        """Number of dimensions of that weight."""
        return self.codes.ndim

    @property
    def group_size(self) -> int:
        """G, weights that share a scale."""
        return self.codes.shape[-2] * CODES_PER_WORD // self.scales.shape[-2]


def quantize(
    w: Float[Array, "*stack K N"],
    group_size: int = GROUP_SIZE,
    scales: Float[Array, "*stack groups N"] | None = None,
) -> Int4Weight:
    """Rounds a weight to codes and scales.

    With w in bfloat16, s = bfloat16(max(max |w| / 7, 1e-5)) over each group and
    code = clip(round(w / s), -7, 7), ties to even. The scale is rounded before it divides, since it
    is stored rounded. Every device and kernel finds the same codes: see `nearest_codes`.

    Args:
      w: weights of any floating dtype, which are rounded to bfloat16; groups lie along K.
      group_size: G, a multiple of 8 that divides K.
      scales: bfloat16, to be used as they are; codes that do not reach a weight saturate.

    Raises:
      ValueError: the group size fits neither K nor whole words.
    """
    *stack, inputs, outputs = w.shape
    if group_size % CODES_PER_WORD or inputs % group_size:
        raise ValueError(
            f"int4: groups of {group_size} do not divide {inputs} inputs into whole words of "
            f"{CODES_PER_WORD}; choose a multiple of {CODES_PER_WORD} that divides {inputs}"
        )
    groups = w.astype(jnp.float32).reshape(*stack, inputs // group_size, group_size, outputs)
    groups = to_bfloat16_grid(groups)
    scales = group_scales(groups) if scales is None else scales
    codes = nearest_codes(groups / scales.astype(jnp.float32)[..., None, :])
    return Int4Weight(codes=pack(codes.reshape(*stack, inputs, outputs)), scales=scales)


def nearest_codes(quotients: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Rounds quotients of bfloat16 numbers to codes, ties to even, whatever their last bits are.

    Compilers and chips divide by multiplying with a reciprocal, which turns some ties into what
    they are not. A quotient of two bfloat16 numbers is a tie, or further than 2^-10 from one: to
    12 binary places it is right again.
    """
    quotients = jnp.round(quotients * _TIE_GRID) / _TIE_GRID
    return jnp.clip(jnp.round(quotients), -LARGEST_CODE, LARGEST_CODE).astype(jnp.int32)


def group_scales(groups: Float[Array, "*stack G N"]) -> Array:
    """Returns the scale of each group, the smallest one that clips nothing, in bfloat16."""
    largest = jnp.max(jnp.abs(groups.astype(jnp.float32)), axis=-2)
    scales = jnp.maximum(largest / LARGEST_CODE, SMALLEST_SCALE)
    return to_bfloat16_grid(scales).astype(jnp.bfloat16)


def to_bfloat16_grid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds float32 numbers to those that bfloat16 has.

    A conversion to bfloat16 and back is nothing to XLA, which leaves it out where it fuses both.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def dequantize(weight: Int4Weight, dtype: DTypeLike) -> Float[Array, "*stack K N"]:
    """Returns code * scale, multiplied in float32 and rounded once, to `dtype`."""
    *stack, inputs, outputs = weight.shape
    size = weight.group_size
    codes = unpack(weight.codes).reshape(*stack, inputs // size, size, outputs)
    scales = weight.scales.astype(jnp.float32)[..., None, :]
    values = codes.astype(jnp.float32) * scales
    if dtype == jnp.bfloat16:
        values = to_bfloat16_grid(values)
    return values.astype(dtype).reshape(weight.shape)


def pack(codes: Int[Array, "*stack K N"]) -> Int[Array, "*stack words N"]:
    """Packs codes in [-8, 7], eight along K to a word."""
    *stack, inputs, outputs = codes.shape
    nibbles = (codes + _OFFSET).reshape(*stack, inputs // CODES_PER_WORD, CODES_PER_WORD, outputs)
    shifted = nibbles.astype(jnp.uint32) << _shifts()
    words = jnp.sum(shifted, axis=-2, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack(words: Int[Array, "*stack words N"]) -> Int[Array, "*stack K N"]:
    """Undoes `pack`; codes are int32."""
    *stack, count, outputs = words.shape
    nibbles = (words[..., None, :] >> _shifts().astype(jnp.int32)) & (2**_BITS - 1)
    return nibbles.reshape(*stack, count * CODES_PER_WORD, outputs) - _OFFSET


def _shifts() -> Array:
    return (_BITS * jnp.arange(CODES_PER_WORD, dtype=jnp.uint32))[:, None]
