"""Attention at Kimi K2's shapes compiles for Hopper GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.mla_attention import cases, mla_attention
from tests.support.compile_kernel import GPU_CHIPS, compile_kernel, shapes

_KERNELS = {"attention": 1, "gradient": 3}  # custom calls


def _attend(**operands):
    return mla_attention(**operands, scale=0.07, implementation=Implementation.PALLAS_GPU)


def _gradient(segments, **operands):
    def loss(operands):
        return jnp.sum(_attend(**operands, segments=segments)[0].astype(jnp.float32))

    return jax.grad(loss)(operands)


_PROGRAMS = {"attention": _attend, "gradient": _gradient}


@pytest.mark.slow
class MlaAttentionPallasGpuSlowTest(parameterized.TestCase):
    @parameterized.product(chip=GPU_CHIPS, name=list(cases.KIMI_K2), program=list(_PROGRAMS))
    def test_attention_and_its_gradient_compile(self, chip, name, program):
        operands = shapes(cases, cases.KIMI_K2[name])
        compiled = compile_kernel(self, chip, _PROGRAMS[program], **operands)
        self.assertEqual(compiled.as_text().count("mosaic_gpu_v2"), _KERNELS[program])


if __name__ == "__main__":
    absltest.main()
