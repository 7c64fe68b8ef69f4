"""Rotary position embedding in interleaved order, with YaRN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.configs.model import ModelConfig, YarnConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the R/2 angles per position, in radians, in float64.

    Without YaRN, f_i = theta^(-2i/R). YaRN keeps frequencies that turn more than beta_fast times
    within the original context, divides those that turn less than beta_slow times by the factor,
    and blends linearly in between (arXiv 2309.00071, section 3.2). K2 sets both betas to 1, which
    makes the blend a step.
    """
    half = config.head_rope_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if config.yarn is None:
        return frequencies
    low, high = _correction_range(config, config.yarn)
    interpolated = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1 - interpolated) + frequencies / config.yarn.factor * interpolated


def _correction_range(config: ModelConfig, yarn: YarnConfig) -> tuple[float, float]:
    """Indices of the last frequency to keep and the first to divide."""

    def index_of(rotations: float) -> float:
        wavelength = yarn.original_max_position / rotations
        turns = math.log(wavelength / (2 * math.pi))
        return config.head_rope_dim * turns / (2 * math.log(config.rope_theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), config.head_rope_dim - 1)
    # The published code's own guard against a division by zero.
    return float(low), high + 0.001 if low == high else float(high)


def attention_scale(config: ModelConfig) -> float:
    """Returns the factor of the logits, (H + R)^-0.5, times m^2 under YaRN.

    m = 0.1 * mscale_all_dim * ln(factor) + 1.
    """
    scale = config.head_qk_dim**-0.5
    if config.yarn is None:
        return scale
    return scale * _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def _mscale(factor: float, strength: float) -> float:
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def cos_sin(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]:
    """Returns cosines and sines of position * frequency, in float32, times YaRN's amplitude.

    The amplitude is mscale / mscale_all_dim, both passed through 0.1 * m * ln(factor) + 1: 1 for
    K2.
    """
    # Angles are 2^-32 parts of a turn: integers drop whole turns when they overflow. At position
    # 2^21 that is off by 0.0015 at most, where position * frequency in float32 is off by 0.1.
    parts = np.round(inverse_frequencies(config) / (2 * math.pi) * 2**32).astype(np.uint32)
    phases = positions.astype(jnp.uint32)[..., None] * jnp.asarray(parts)
    half_turns = jax.lax.bitcast_convert_type(phases, jnp.int32)  # from -1 to 1, in parts of 2^-31
    angles = half_turns.astype(jnp.float32) * (math.pi / 2**31)
    yarn = config.yarn
    amplitude = 1.0
    if yarn is not None:
        amplitude = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotate(
    x: Float[Array, "*shape R"], cos: Float[Array, "*#shape R2"], sin: Float[Array, "*#shape R2"]
) -> Float[Array, "*shape R"]:
    """Rotates the pairs (x_2i, x_2i+1) by their angles.

    The result holds all first members, then all second ones. Queries and keys get the same order,
    so that their products are those of the interleaved order that checkpoints are stored for.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
