"""The TPU's grouped product, interpreted: it runs on any platform."""

import functools

from kimi_jax.kernels.grouped_matmul import pallas_tpu
from kimi_jax.kernels.grouped_matmul.gradients import differentiable

_PIECES = (pallas_tpu.forward, pallas_tpu.input_gradient, pallas_tpu.weight_gradient)


def interpreted(**options):
    """Returns the differentiable product; options are those of each piece."""
    return differentiable(*(functools.partial(p, interpret=True, **options) for p in _PIECES))
