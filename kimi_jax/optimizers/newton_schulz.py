"""Newton-Schulz iteration: the orthogonal matrix nearest to a matrix, by matrix products alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kimi_jax.configs.optimizer import NewtonSchulzDtype, NewtonSchulzPreset

Coefficients = tuple[float, float, float]

# Added to the norm, so that a zero matrix stays zero. From K. Jordan's post on Muon.
_NORM_EPS = 1e-7

# One cubic-quintic for every step. It never settles at 1: singular values end in 0.68 .. 1.2.
# Source: K. Jordan's post on Muon; the values of arXiv 2502.16982, section 2.1.
_JORDAN = ((3.4445, -4.7750, 2.0315),)

# Five steps tuned one after the other. Source: Y. Jiacheng's tables, as used in Dion
# (arXiv 2504.05295).
_YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Minimax polynomials for singular values in [1e-3, 1]. Source: Polar Express (arXiv 2505.16932),
# algorithm 1. All but the last are divided by a safety factor, which keeps rounding errors from
# pushing singular values above 1, where the polynomials diverge.
_POLAR_EXPRESS_SAFETY = 1.01
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def coefficients(preset: NewtonSchulzPreset, steps: int) -> tuple[Coefficients, ...]:
    """Returns (a, b, c) of each step; beyond its table, a preset repeats the last row."""
    table = {
        NewtonSchulzPreset.JORDAN: _JORDAN,
        NewtonSchulzPreset.YOU: _YOU,
        NewtonSchulzPreset.POLAR_EXPRESS: (
            *map(_make_safe, _POLAR_EXPRESS[:-1]),
            _POLAR_EXPRESS[-1],
        ),
    }[preset]
    return tuple(table[min(step, len(table) - 1)] for step in range(steps))


def newton_schulz(
    x: Float[Array, "*c n m"],
    *,
    steps: int,
    preset: NewtonSchulzPreset,
    dtype: NewtonSchulzDtype,
) -> Float[Array, "*c n m"]:
    """Moves every singular value of each matrix towards 1.

    X_0 = x / (|x|_F + eps);  X <- a X + (b A + c A^2) X with A = X X^T, on the side where A is
    smaller. An odd polynomial of the singular values; singular vectors stay.

    Args:
      x: matrices; all leading dimensions are a batch.
      steps: iterations, at least 1.
      preset: coefficients.
      dtype: format of the factors of each product; sums are float32.

    Returns:
      Matrices of the dtype of `x`; a zero matrix stays zero.

    Source: arXiv 2502.16982, section 2.1.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if is_tall else x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True))
    wide = wide / (norm + _NORM_EPS)

    def step(wide, row):
        a, b, c = row
        factor = wide.astype(dtype.value)
        gram = _product(factor, factor.mT)
        gram_factor = gram.astype(dtype.value)
        polynomial = b * gram + c * _product(gram_factor, gram_factor)
        return a * wide + _product(polynomial.astype(dtype.value), factor), None

    # A scan compiles one step instead of all, and runs as fast.
    rows = jnp.asarray(coefficients(preset, steps), jnp.float32)
    wide, _ = jax.lax.scan(step, wide, rows)
    return (wide.mT if is_tall else wide).astype(x.dtype)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _make_safe(row: Coefficients) -> Coefficients:
    a, b, c = row
    s = _POLAR_EXPRESS_SAFETY
    return a / s, b / s**3, c / s**5
