"""Grouped products at Kimi K2's shapes compile for Hopper GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.grouped_matmul import cases, pallas_gpu
from tests.support.compile_kernel import GPU_CHIPS, KEY, compile_kernel


def _operands(name):
    return jax.eval_shape(functools.partial(cases.operands, cases.KIMI_K2[name]), KEY)


def _gradient(name):
    case = cases.KIMI_K2[name]
    return jax.ShapeDtypeStruct((case.rows, case.outputs), jnp.bfloat16)


@pytest.mark.slow
class GroupedMatmulPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_product_and_gradients_compile(self, chip, name):
        x, w, sizes = (_operands(name)[key] for key in ("x", "w", "group_sizes"))
        d_y = _gradient(name)
        compile_kernel(self, chip, pallas_gpu.forward, x, w, sizes)
        compile_kernel(self, chip, pallas_gpu.input_gradient, d_y, w, sizes)
        compile_kernel(self, chip, pallas_gpu.weight_gradient, x, d_y, sizes)


if __name__ == "__main__":
    absltest.main()
