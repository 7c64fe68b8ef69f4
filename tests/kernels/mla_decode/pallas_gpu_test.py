import functools
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from kimi_jax.kernels.hopper import program
from kimi_jax.kernels.mla_decode import cases, pallas_gpu
from tests.support.gradients import FLOAT32_TOLERANCE, assert_close

SCALE = 0.3
# Blocks have 64 positions.
_CASE = cases.Case(lengths=(150, 0, 64, 5), positions=150, heads=3, latent=128, rope=64)


def _inputs(case):
    rng = np.random.default_rng(0)
    batch = len(case.lengths)
    of_heads, of_cache = (batch, case.heads), (batch, case.positions)
    shapes = [(*lead, n) for lead in (of_heads, of_cache) for n in (case.latent, case.rope)]
    return [rng.standard_normal(shape) for shape in shapes]


def _oracle(q_latent, q_rope, latents, k_rope, lengths):
    """Sequence by sequence, in float64."""
    out = np.zeros_like(q_latent)
    for b, length in enumerate(lengths):
        if length > 0:
            c = latents[b, :length]
            logits = SCALE * (q_latent[b] @ c.T + q_rope[b] @ k_rope[b, :length].T)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b] = weights @ c / weights.sum(axis=1, keepdims=True)
    return out


class MlaDecodePallasGpuTest(parameterized.TestCase):
    @unittest.skipUnless(
        hasattr(plgpu, "InterpretGPUParams"),
        "this JAX has no public interpreter of Mosaic GPU kernels",
    )
    @parameterized.named_parameters(("one_split", 4), ("a_split_for_each_block", 132))
    def test_output_equals_float64_and_what_lies_behind_is_not_used(self, multiprocessors):
        operands = _inputs(_CASE)
        expected = _oracle(*operands, _CASE.lengths)
        behind = np.arange(_CASE.positions) >= np.array(_CASE.lengths)[:, None]
        for of_cache in operands[2:]:
            of_cache[behind] = np.nan
        with mock.patch.object(program, "MULTIPROCESSORS", multiprocessors):
            actual = pallas_gpu.mla_decode(
                *(jnp.asarray(a, jnp.float32) for a in operands),
                jnp.array(_CASE.lengths, jnp.int32),
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
