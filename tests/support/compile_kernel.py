"""Compiles a function of arrays for one accelerator that is not there.

A slow test of a kernel:

    class MyKernelCompiledSlowTest(parameterized.TestCase):
        @parameterized.product(chip=TPU_CHIPS, name=list(cases.KIMI_K2))
        def test_it_compiles(self, chip, name):
            operands = shapes(cases, cases.KIMI_K2[name])
            compile_kernel(self, chip, my_kernel, **operands)
"""

import importlib.util
import unittest
from collections.abc import Callable
from typing import Any

import jax

from kimi_jax.parallel import topologies

# The smallest arrangement of each chip.
_ARRANGEMENTS = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h100": "h100:1",
    "h200": "h200:1",
}
TPU_CHIPS = ("v5p", "v6e", "tpu7x")
GPU_CHIPS = ("h100",)


def shapes(cases: Any, case: Any) -> dict[str, Any]:
    """Returns the shapes and formats of a case's operands, by name; `cases` is its module."""
    return jax.eval_shape(lambda: cases.operands(case, jax.random.key(0)))


def compile_kernel(
    test: unittest.TestCase, chip: str, fn: Callable[..., Any], *operands: Any, **keywords: Any
) -> jax.stages.Compiled:
    """Compiles `fn(*operands, **keywords)`; skips the test where the compiler is not installed.

    Args:
      test: the test that asks.
      chip: "v5e", "v5p", "v6e", "tpu7x", "h100" or "h200".
      fn: of arrays; what else it needs is bound before.
      *operands: arrays or their shapes and formats, such as `jax.eval_shape` gives.
      **keywords: the same, by name.
    """
    _skip_without_compiler(test, chip)
    topologies.prepare_environment()
    device = topologies.absent_devices(_ARRANGEMENTS[chip])[0]
    # What is compiled for an absent device is never run, so nobody would read it from the cache.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return topologies.compile_for(device, fn, *operands, **keywords)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _skip_without_compiler(test: unittest.TestCase, chip: str) -> None:
    on_tpu = chip in topologies.TPU_KINDS
    compilers = ("libtpu",) if on_tpu else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(name) for name in compilers):
        extra = "aot" if on_tpu else "aot-cuda"
        test.skipTest(f"compiling for {chip} needs the extra {extra}: pip install -e '.[{extra}]'")
