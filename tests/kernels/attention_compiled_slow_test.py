"""Attention and decoding at Kimi K2's sizes compile for TPUs that are not there."""

import functools

import jax
import pytest
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels import mla_attention, mla_decode
from kimi_jax.kernels.mla_attention import cases as attention_cases
from kimi_jax.kernels.mla_decode import cases as decode_cases
from tests.support.compile_kernel import TPU_CHIPS, compile_kernel, shapes

_PALLAS = {"scale": 0.07, "implementation": Implementation.PALLAS_TPU}


def _both_passes(operands, segments):
    def attend(operands):
        return mla_attention.mla_attention(**operands, segments=segments, **_PALLAS)

    (out, max_logit), pull_back = jax.vjp(attend, operands)
    return out, max_logit, pull_back((out, max_logit))


@pytest.mark.slow
class AttentionCompiledSlowTest(parameterized.TestCase):
    @parameterized.product(chip=TPU_CHIPS, name=list(attention_cases.KIMI_K2))
    def test_attention_and_its_gradients_compile_and_hold_nothing_per_pair(self, chip, name):
        operands = shapes(attention_cases, attention_cases.KIMI_K2[name])
        segments = operands.pop("segments")
        compiled = compile_kernel(self, chip, _both_passes, operands, segments)
        memory = compiled.memory_analysis()
        # Gradients by head of the shared key, transposed operands: of the operands' size.
        self.assertLess(memory.temp_size_in_bytes, 3 * memory.argument_size_in_bytes)

    @parameterized.product(chip=TPU_CHIPS, name=list(decode_cases.KIMI_K2))
    def test_decoding_compiles_and_does_not_copy_the_cache(self, chip, name):
        operands = shapes(decode_cases, decode_cases.KIMI_K2[name])
        decode = functools.partial(mla_decode.mla_decode, **_PALLAS)
        compiled = compile_kernel(self, chip, decode, **operands)
        memory = compiled.memory_analysis()
        self.assertLess(memory.temp_size_in_bytes, 0.01 * memory.argument_size_in_bytes)


if __name__ == "__main__":
    absltest.main()
