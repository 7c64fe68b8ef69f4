"""What tests of kernels for Hopper GPUs need."""

import unittest

import jax

# Mosaic GPU's interpreter in jax 0.10 knows neither the kernels' cost nor `layout_cast`.
interpreted = unittest.skipIf(
    jax.__version_info__ < (0, 11),
    f"jax {jax.__version__} cannot interpret these kernels for GPUs; jax 0.12 can",
)
