"""Values, gradients and comparisons that the kernel tests share."""

import jax
import numpy as np

# Sums of a few hundred float32 products in another order than the float64 oracle's.
FLOAT32_TOLERANCE = 1e-5
# bfloat16 keeps 8 bits (a step of 2**-8 = 4e-3); inputs, intermediate values and results are each
# rounded to it once.
BFLOAT16_TOLERANCE = 2e-2


def value_and_gradients(fn, arguments, cotangent, fixed=()):
    """Returns fn(*arguments, *fixed) and the gradient of each argument, compiled together.

    What is passed as `fixed`, rather than closed over, does not make another program to compile.
    """

    def run(arguments, cotangent, fixed):
        value, pull_back = jax.vjp(lambda *a: fn(*a, *fixed), *arguments)
        return value, pull_back(cotangent)

    return jax.jit(run)(arguments, cotangent, fixed)


def assert_close(actual, expected, tolerance):
    """Compares relative to the largest expected value: sums of many terms cancel."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(1e-3, np.max(np.abs(expected), initial=0.0))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)
