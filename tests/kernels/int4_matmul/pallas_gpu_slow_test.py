"""Products with INT4 weights, at Kimi K2's shapes, compile for Hopper GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.int4_matmul import cases, pallas_gpu
from tests.support.compile_kernel import GPU_CHIPS, compile_kernel, shapes


@pytest.mark.slow
class Int4MatmulPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_product_and_gradient_compile(self, chip, name):
        case = cases.KIMI_K2[name]
        operands = shapes(cases, case)
        compile_kernel(self, chip, pallas_gpu.int4_matmul, **operands)
        d_y = jax.ShapeDtypeStruct((case.rows, case.outputs), jnp.bfloat16)
        compile_kernel(self, chip, pallas_gpu.int4_matmul_transposed, d_y, operands["w"])


if __name__ == "__main__":
    absltest.main()
