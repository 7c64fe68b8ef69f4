import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.mla_decode import cases, pallas_gpu
from tests.support.decode_oracle import SCALE, decode_inputs, decode_oracle
from tests.support.gradients import FLOAT32_TOLERANCE, assert_close
from tests.support.hopper import interpreted

# Blocks have 64 positions.
_CASE = cases.Case(lengths=(150, 0, 64, 5), positions=150, heads=3, latent=128, rope=64)


class MlaDecodePallasGpuTest(parameterized.TestCase):
    @interpreted
    @parameterized.named_parameters(("one_split", 4), ("a_split_for_each_block", 132))
    def test_output_equals_float64_and_what_lies_behind_is_not_used(self, multiprocessors):
        operands, lengths = decode_inputs(_CASE)
        expected = decode_oracle(*operands, lengths)
        behind = np.arange(_CASE.positions) >= lengths[:, None]
        for of_cache in operands[2:]:
            of_cache[behind] = np.nan
        with mock.patch.object(program, "MULTIPROCESSORS", multiprocessors):
            actual = pallas_gpu.mla_decode(
                *(jnp.asarray(a, jnp.float32) for a in operands),
                jnp.asarray(lengths, jnp.int32),
                scale=SCALE,
                interpret=True,
            )
        assert_close(actual, expected, FLOAT32_TOLERANCE)

    def test_widths_that_blocks_do_not_fit_raise(self):
        operands = jax.eval_shape(lambda: cases.operands(cases.TOY["ragged"], jax.random.key(0)))
        with self.assertRaisesRegex(NotImplementedError, "got 8 and 4"):
            jax.eval_shape(
                functools.partial(pallas_gpu.mla_decode, scale=SCALE, interpret=True), **operands
            )

    def test_a_device_that_is_no_hopper_gpu_raises(self):
        operands = jax.eval_shape(lambda: cases.operands(_CASE, jax.random.key(0)))
        with self.assertRaisesRegex(NotImplementedError, "compute capability 9.0"):
            jax.eval_shape(functools.partial(pallas_gpu.mla_decode, scale=SCALE), **operands)


if __name__ == "__main__":
    absltest.main()
