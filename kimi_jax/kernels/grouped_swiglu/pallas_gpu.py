"""The program of `xla_accelerator.py` with this project's own product, for Hopper GPUs.

Weights in four bits stay so in every product: forward, and towards the rows in the backward pass.
"""

import functools

from kimi_jax.kernels.grouped_matmul import pallas_gpu
from kimi_jax.kernels.grouped_swiglu import xla_accelerator

grouped_swiglu = functools.partial(
    xla_accelerator.grouped_swiglu, product=pallas_gpu.grouped_matmul
)
