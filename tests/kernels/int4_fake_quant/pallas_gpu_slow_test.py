"""Products with rounded weights at Kimi K2's shapes compile for an H100 that is not there."""

import functools

import jax
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.int4_fake_quant import cases, pallas_gpu
from tests.support.compile_kernel import GPU_CHIPS, compile_kernel, shapes


@pytest.mark.slow
class Int4FakeQuantPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_product_and_gradients_compile(self, chip, name):
        case = cases.KIMI_K2[name]

        def product_and_gradients(x, w):
            multiply = functools.partial(pallas_gpu.int4_fake_quant, group_size=case.group_size)
            y, pull_back = jax.vjp(multiply, x, w)
            return y, pull_back(y)

        compiled = compile_kernel(self, chip, product_and_gradients, **shapes(cases, case))
        self.assertEqual(compiled.as_text().count("mosaic_gpu_v2"), 2)


if __name__ == "__main__":
    absltest.main()
