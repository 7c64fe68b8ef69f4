"""What the machine can do at most, measured, and how much memory the process holds."""

import functools
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.mesh import make_mesh

# Sides of the square matrices: large enough to reach the peak, small enough for a fraction of a
# second (17 GFLOP on a CPU, 1.1 TFLOP on an accelerator).
CPU_SIDE = 2048
ACCELERATOR_SIDE = 8192
MEASURE_SECONDS = 0.5
# Products of one timing; an accelerator needs several to hide the launch.
CPU_PRODUCTS = 1
ACCELERATOR_PRODUCTS = 16


def measure_matmul_peak(dtype: Any) -> float:
    """Measures the rate of large matrix products on all devices of the run together.

    One device computes products of two square matrices for about half a second, and the fastest
    counts. Simulated devices share the cores of one CPU, so that one of them, which uses every
    core, stands for all; accelerators are multiplied by their number. The result is kept, so the
    second call with the same dtype costs nothing.

    Args:
      dtype: format of the matrices, such as "bfloat16"; products are made at JAX's default
        precision, as the model's are.

    Returns:
      FLOP/s, two for a multiplication and its addition.
    """
    return _measure(jnp.dtype(dtype).name)


def process_memory_bytes() -> int:
    """Bytes in use: on local accelerators together, or on a CPU the process's resident memory."""
    stats = _device_stats()
    if stats:
        return sum(device["bytes_in_use"] for device in stats)
    return psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """The most bytes ever used: of the fullest local accelerator, or by the process on a CPU."""
    stats = _device_stats()
    if stats:
        return max(device["peak_bytes_in_use"] for device in stats)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def _measure(dtype: str) -> float:
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    side = CPU_SIDE if on_cpu else ACCELERATOR_SIDE
    products = CPU_PRODUCTS if on_cpu else ACCELERATOR_PRODUCTS
    # The run's own mesh may be set, and would spread the matrices over all devices.
    with jax.set_mesh(make_mesh(ParallelConfig(data=1, expert=1), 1, [device])):
        seconds = _fastest(dtype, side, products)
    return 2.0 * side**3 * products / seconds * (1 if on_cpu else jax.device_count())


def _fastest(dtype: str, side: int, products: int) -> float:
    """Seconds of the fastest run of a chain of products."""

    @jax.jit
    def chain(left: jax.Array, right: jax.Array) -> jax.Array:
        for _ in range(products):
            # XLA's bfloat16 product on CPU is twice as fast when it keeps its float32 sum.
            left = jnp.matmul(left, right, preferred_element_type=jnp.float32).astype(dtype)
        return left

    # Random signs: some hardware is faster, at lower power, on constant matrices.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (side, side))
    left, right = jnp.asarray(signs, dtype), jnp.asarray(signs / np.sqrt(side), dtype)
    jax.block_until_ready(chain(left, right))
    best, end = np.inf, time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(chain(left, right))
        best = min(best, time.perf_counter() - start)
    return float(best)


def _device_stats() -> list[dict[str, int]]:
    return [stats for device in jax.local_devices() if (stats := device.memory_stats())]
