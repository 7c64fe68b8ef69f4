"""The products' kernels compile for an H100 that is not there, at Kimi K2's shapes."""

import jax
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.kernels.grouped_matmul import cases as grouped_cases
from kimi_jax.kernels.grouped_matmul import pallas_gpu as grouped
from kimi_jax.kernels.int4_fake_quant import cases as fake_quant_cases
from kimi_jax.kernels.int4_fake_quant import pallas_gpu as fake_quant
from kimi_jax.kernels.int4_matmul import cases as int4_cases
from kimi_jax.kernels.int4_matmul import pallas_gpu as int4_matmul
from tests.support.compile_kernel import GPU_CHIPS, KEY, compile_kernel


def _operands(cases, name):
    return jax.eval_shape(lambda key: cases.operands(cases.KIMI_K2[name], key), KEY)


def _gradient_like(case):
    return jax.ShapeDtypeStruct((case.rows, case.outputs), jax.numpy.bfloat16)


@pytest.mark.slow
class GpuMatmulCompiledSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(grouped_cases.KIMI_K2))
    def test_grouped_products_compile(self, chip, name):
        case = grouped_cases.KIMI_K2[name]
        x, w, sizes = (_operands(grouped_cases, name)[key] for key in ("x", "w", "group_sizes"))
        d_y = _gradient_like(case)
        compile_kernel(self, chip, grouped.forward, x, w, sizes)
        compile_kernel(self, chip, grouped.input_gradient, d_y, w, sizes)
        compile_kernel(self, chip, grouped.weight_gradient, x, d_y, sizes)

    @parameterized.product(chip=GPU_CHIPS, name=list(int4_cases.KIMI_K2))
    def test_products_with_int4_weights_compile(self, chip, name):
        operands = _operands(int4_cases, name)
        compile_kernel(self, chip, int4_matmul.int4_matmul, **operands)
        d_y = _gradient_like(int4_cases.KIMI_K2[name])
        compile_kernel(self, chip, int4_matmul.int4_matmul_transposed, d_y, operands["w"])

    @parameterized.product(chip=GPU_CHIPS, name=list(fake_quant_cases.KIMI_K2))
    def test_products_with_rounded_weights_compile(self, chip, name):
        case = fake_quant_cases.KIMI_K2[name]

        def product(x, w):
            return fake_quant.int4_fake_quant(x, w, case.group_size)

        compile_kernel(self, chip, product, **_operands(fake_quant_cases, name))


if __name__ == "__main__":
    absltest.main()
