"""Decoding at Kimi K2's shapes compiles for Hopper GPUs that are not there."""

import functools

import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.mla_decode import cases, mla_decode
from tests.support.compile_kernel import GPU_CHIPS, compile_kernel, shapes


@pytest.mark.slow
class MlaDecodePallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2))
    def test_decoding_compiles(self, chip, name):
        operands = shapes(cases, cases.KIMI_K2[name])
        decode = functools.partial(mla_decode, scale=0.07, implementation=Implementation.PALLAS_GPU)
        compiled = compile_kernel(self, chip, decode, **operands)
        self.assertEqual(compiled.as_text().count("mosaic_gpu_v2"), 1)


if __name__ == "__main__":
    absltest.main()
