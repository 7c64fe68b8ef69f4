"""Grouped products at Kimi K2's shapes compile for Hopper GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.grouped_matmul import cases, pallas_gpu
from tests.support.compile_kernel import GPU_CHIPS, compile_kernel, shapes


@pytest.mark.slow
class GroupedMatmulPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_product_and_gradients_compile(self, chip, name):
        case = cases.KIMI_K2[name]
        x, w, sizes = (shapes(cases, case)[key] for key in ("x", "w", "group_sizes"))
        d_y = jax.ShapeDtypeStruct((case.rows, case.outputs), jnp.bfloat16)
        compile_kernel(self, chip, pallas_gpu.forward, x, w, sizes)
        compile_kernel(self, chip, pallas_gpu.input_gradient, d_y, w, sizes)
        compile_kernel(self, chip, pallas_gpu.weight_gradient, x, d_y, sizes)


if __name__ == "__main__":
    absltest.main()
