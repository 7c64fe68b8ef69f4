import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.mla_attention import cases, pallas_gpu
from tests.support.attention_oracle import (
    SCALE,
    attention_inputs,
    attention_oracle,
    inputs_with_negative_logits,
    run_attention,
)
from tests.support.gradients import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, assert_close
from tests.support.hopper import interpreted

# Tiles have 128 positions, blocks 128 or 64: they lie before, on and behind the diagonal.
_TWO_TILES = cases.Case(batch=1, positions=200, heads=2, nope=64, rope=64, value=64, documents=3)
_WIDE = cases.Case(batch=1, positions=70, heads=1, nope=128, rope=64, value=128, documents=2)
_THREE_TILES = cases.Case(batch=2, positions=258, heads=1, nope=64, rope=64, value=64, documents=2)


_INTERPRETED = functools.partial(pallas_gpu.mla_attention, scale=SCALE, interpret=True)


@interpreted
class MlaAttentionPallasGpuInterpretedTest(parameterized.TestCase):
    @parameterized.parameters(
        (_TWO_TILES, jnp.float32, FLOAT32_TOLERANCE), (_WIDE, jnp.bfloat16, BFLOAT16_TOLERANCE)
    )
    def test_output_maximum_and_gradients_equal_float64(self, case, dtype, tolerance):
        operands, segments, d_out = attention_inputs(case)
        actual = run_attention(_INTERPRETED, operands, segments, d_out, dtype)
        self.assertEqual((actual[0].dtype, actual[1].dtype), (dtype, jnp.float32))
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, tolerance)

    def test_a_head_whose_logits_are_all_negative_has_a_negative_maximum(self):
        operands, segments = inputs_with_negative_logits(_THREE_TILES)
        _, expected, _ = attention_oracle(*operands, segments, operands[-1])
        self.assertLess(expected.max(), -1.0)
        arrays = (jnp.asarray(a, jnp.float32) for a in operands)
        _, actual = _INTERPRETED(*arrays, jnp.asarray(segments, jnp.int32))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


class MlaAttentionPallasGpuTest(parameterized.TestCase):
    def test_widths_that_blocks_do_not_fit_raise(self):
        operands = jax.eval_shape(lambda: cases.operands(cases.TOY["one_block"], jax.random.key(0)))
        with self.assertRaisesRegex(NotImplementedError, "got 8, 4 and 6"):
            jax.eval_shape(_INTERPRETED, **operands)

    def test_a_device_that_is_no_hopper_gpu_raises(self):
        operands = jax.eval_shape(lambda: cases.operands(_WIDE, jax.random.key(0)))
        with self.assertRaisesRegex(NotImplementedError, "compute capability 9.0"):
            jax.eval_shape(functools.partial(pallas_gpu.mla_attention, scale=SCALE), **operands)

    def test_operands_that_are_not_bfloat16_raise(self):
        operands = jax.eval_shape(lambda: cases.operands(_WIDE, jax.random.key(0)))
        operands = {name: jnp.zeros(x.shape, jnp.float32) for name, x in operands.items()}
        operands["segments"] = operands["segments"].astype(jnp.int32)
        with self.assertRaisesRegex(NotImplementedError, "takes bfloat16, got float32"):
            pallas_gpu.mla_attention(**operands, scale=SCALE)


if __name__ == "__main__":
    absltest.main()
