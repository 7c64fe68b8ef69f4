"""Products with INT4 weights, at Kimi K2's shapes, compile for Hopper GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.int4_matmul import cases, pallas_gpu
from tests.support.compile_kernel import GPU_CHIPS, KEY, compile_kernel


def _operands(name):
    return jax.eval_shape(functools.partial(cases.operands, cases.KIMI_K2[name]), KEY)


def _gradient(name):
    case = cases.KIMI_K2[name]
    return jax.ShapeDtypeStruct((case.rows, case.outputs), jnp.bfloat16)


@pytest.mark.slow
class Int4MatmulPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_product_and_gradient_compile(self, chip, name):
        operands = _operands(name)
        compile_kernel(self, chip, pallas_gpu.int4_matmul, **operands)
        d_y = _gradient(name)
        compile_kernel(self, chip, pallas_gpu.int4_matmul_transposed, d_y, operands["w"])


if __name__ == "__main__":
    absltest.main()
