"""The kernels of attention compile for Hopper GPUs that are not there, at K2's shapes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels import mla_attention as attention
from kimi_jax.kernels import mla_decode as decode
from kimi_jax.kernels.mla_attention import cases as attention_cases
from kimi_jax.kernels.mla_decode import cases as decode_cases
from tests.support.compile_kernel import GPU_CHIPS, KEY, compile_kernel

_SCALE = 0.07
_KERNELS = {"attention": 1, "attention_gradient": 3}  # custom calls


def _attend(**operands):
    return attention.mla_attention(
        **operands, scale=_SCALE, implementation=Implementation.PALLAS_GPU
    )


def _gradient(segments, **operands):
    def loss(operands):
        return jnp.sum(_attend(**operands, segments=segments)[0].astype(jnp.float32))

    return jax.grad(loss)(operands)


_PROGRAMS = {"attention": _attend, "attention_gradient": _gradient}


@pytest.mark.slow
class GpuAttentionCompiledSlowTest(parameterized.TestCase):
    @parameterized.product(
        chip=GPU_CHIPS, name=list(attention_cases.KIMI_K2), program=list(_PROGRAMS)
    )
    def test_attention_and_its_gradient_compile(self, chip, name, program):
        case = attention_cases.KIMI_K2[name]
        operands = jax.eval_shape(functools.partial(attention_cases.operands, case), KEY)
        compiled = compile_kernel(self, chip, _PROGRAMS[program], **operands)
        self.assertEqual(compiled.as_text().count("mosaic_gpu_v2"), _KERNELS[program])

    @parameterized.product(chip=GPU_CHIPS, name=list(decode_cases.KIMI_K2))
    def test_decoding_compiles(self, chip, name):
        case = decode_cases.KIMI_K2[name]
        operands = jax.eval_shape(functools.partial(decode_cases.operands, case), KEY)
        run = functools.partial(
            decode.mla_decode, scale=_SCALE, implementation=Implementation.PALLAS_GPU
        )
        compiled = compile_kernel(self, chip, run, **operands)
        self.assertEqual(compiled.as_text().count("mosaic_gpu_v2"), 1)


if __name__ == "__main__":
    absltest.main()
