"""Compiles the INT4 kernels at Kimi K2's sizes for TPUs that are not there. Needs extra `aot`."""

import jax
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.int4_fake_quant import cases as fake_quant_cases
from kimi_jax.kernels.int4_fake_quant import int4_fake_quant
from kimi_jax.kernels.int4_matmul import cases as matmul_cases
from kimi_jax.kernels.int4_matmul import int4_matmul
from tests.support.compile_kernel import TPU_CHIPS, compile_kernel, shapes

_IMPLEMENTATION = Implementation.PALLAS_TPU


def _fake_quant(x, w):
    y, pull_back = jax.vjp(lambda x, w: int4_fake_quant(x, w, implementation=_IMPLEMENTATION), x, w)
    return y, pull_back(y)


def _matmul(x, w):
    y, pull_back = jax.vjp(lambda x: int4_matmul(x, w, implementation=_IMPLEMENTATION), x)
    return y, pull_back(y)


@pytest.mark.slow
class Int4CompiledSlowTest(parameterized.TestCase):
    @parameterized.product(
        chip=TPU_CHIPS, name=("decode_16_up", "decode_256_down", "prefill_4096_up")
    )
    def test_the_product_and_its_gradient_compile(self, chip, name):
        self._check(chip, _matmul, matmul_cases, name, kernels=2)

    @parameterized.product(chip=TPU_CHIPS, name=("train_1024_up", "train_1024_down"))
    def test_the_product_with_a_rounded_weight_and_its_gradients_compile(self, chip, name):
        self._check(chip, _fake_quant, fake_quant_cases, name, kernels=2)

    def _check(self, chip, fn, cases, name, kernels):
        case = cases.KIMI_K2[name]
        compiled = compile_kernel(self, chip, fn, **shapes(cases, case))
        self.assertEqual(compiled.as_text().count('custom_call_target="tpu_custom_call"'), kernels)
        self.assertGreaterEqual(compiled.cost_analysis()["flops"], kernels * cases.cost(case).flops)


if __name__ == "__main__":
    absltest.main()
