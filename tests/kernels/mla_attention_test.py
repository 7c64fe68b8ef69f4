import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.mla_attention import cases, mla_attention
from tests.support.attention_oracle import (
    SCALE,
    attention_inputs,
    attention_oracle,
    inputs_with_larger_hidden_logits,
    inputs_with_negative_logits,
    run_attention,
)
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)


def _run(operands, segments, d_out, dtype, implementation=Implementation.XLA):
    attend = functools.partial(mla_attention, scale=SCALE, implementation=implementation)
    return run_attention(attend, operands, segments, d_out, dtype)


class MlaAttentionTest(parameterized.TestCase):
    @parameterized.product(
        name=list(cases.TOY),
        implementation=[
            Implementation.XLA,
            Implementation.XLA_ACCELERATOR,
            Implementation.REFERENCE,
        ],
    )
    def test_output_maximum_and_gradients_equal_float64(self, name, implementation):
        operands, segments, d_out = attention_inputs(cases.TOY[name])
        actual = _run(operands, segments, d_out, jnp.float32, implementation)
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    @parameterized.product(
        name=["one_block", "ragged_blocks"],
        implementation=[Implementation.XLA, Implementation.XLA_ACCELERATOR],
    )
    def test_bfloat16_output_maximum_and_gradients_are_near_float64(self, name, implementation):
        operands, segments, d_out = attention_inputs(cases.TOY[name])
        out, max_logit, gradients = _run(operands, segments, d_out, jnp.bfloat16, implementation)
        self.assertEqual(max_logit.dtype, jnp.float32)
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip((out, max_logit, *gradients), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, BFLOAT16_TOLERANCE)

    @parameterized.product(
        name=["odd_strips", "ragged_blocks"],
        implementation=[Implementation.XLA, Implementation.XLA_ACCELERATOR],
    )
    def test_a_head_whose_logits_are_all_negative_has_a_negative_maximum(
        self, name, implementation
    ):
        operands, segments = inputs_with_negative_logits(cases.TOY[name])
        d_out = operands[-1]
        _, expected, _ = attention_oracle(*operands, segments, d_out)
        self.assertLess(expected.max(), -1.0)
        _, actual, _ = _run(operands, segments, d_out, jnp.float32, implementation)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    @parameterized.product(
        name=["one_block", "ragged_blocks"],
        implementation=[Implementation.XLA, Implementation.XLA_ACCELERATOR],
    )
    def test_larger_logits_behind_the_mask_do_not_reach_the_maximum(self, name, implementation):
        operands, segments, largest = inputs_with_larger_hidden_logits(cases.TOY[name])
        d_out = operands[-1]
        _, expected, _ = attention_oracle(*operands, segments, d_out)
        self.assertTrue(np.all(largest > expected + 10.0))
        _, actual, _ = _run(operands, segments, d_out, jnp.float32, implementation)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_the_maximum_sends_no_gradient(self):
        operands, segments, _ = attention_inputs(cases.TOY["one_block"])
        arrays = [jnp.asarray(a, jnp.float32) for a in operands]
        for implementation in (
            Implementation.XLA,
            Implementation.XLA_ACCELERATOR,
            Implementation.REFERENCE,
        ):
            gradients = jax.grad(
                lambda *a, chosen=implementation: jnp.sum(
                    mla_attention(
                        *a, jnp.asarray(segments, jnp.int32), scale=SCALE, implementation=chosen
                    )[1]
                ),
                argnums=(0, 1, 2, 3, 4),
            )(*arrays)
            for gradient in gradients:
                np.testing.assert_array_equal(gradient, 0.0)

    def test_heads_that_do_not_fill_a_loop_body_are_all_computed(self):
        case = cases.Case(batch=1, positions=9, heads=11, nope=4, rope=2, value=3)
        operands, segments, d_out = attention_inputs(case)
        actual = _run(operands, segments, d_out, jnp.float32)
        expected = attention_oracle(*operands, segments, d_out)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_gradients_in_shard_map_with_a_replicated_key_equal_the_unsharded_ones(self):
        case = cases.Case(batch=4, positions=20, heads=2, nope=4, rope=2, value=3, documents=2)
        operands, segments, d_out = attention_inputs(case)
        q_nope, q_rope, k_nope, k_rope, value = (jnp.asarray(a, jnp.float32) for a in operands)
        operands = (q_nope, q_rope, k_nope, k_rope[:1], value)
        segments, d_out = jnp.asarray(segments, jnp.int32), jnp.asarray(d_out, jnp.float32)

        def run(q_nope, q_rope, k_nope, k_rope, value, segments):
            k_rope = jnp.broadcast_to(k_rope, (q_rope.shape[0], *k_rope.shape[1:]))
            return mla_attention(q_nope, q_rope, k_nope, k_rope, value, segments, scale=SCALE)[0]

        expected = value_and_gradients(lambda *a: run(*a, segments), operands, d_out)
        split = (P("d"), P("d"), P("d"), P(), P("d"))
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharded = jax.shard_map(
                run, in_specs=(*split, P("d")), out_specs=P("d"), check_vma=False
            )
            actual = value_and_gradients(
                lambda *a: sharded(*a, jax.reshard(segments, P("d"))),
                tuple(map(jax.reshard, operands, split)),
                jax.reshard(d_out, P("d")),
            )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    @parameterized.parameters(
        (Implementation.XLA, False),
        (Implementation.XLA_ACCELERATOR, False),
        (Implementation.REFERENCE, True),
    )
    def test_only_the_reference_holds_all_logits_of_a_long_sequence(self, implementation, holds):
        of_heads, f32 = (1, 1024, 1), jnp.float32
        shapes = [(*of_heads, 8), (*of_heads, 4), (*of_heads, 8), (1, 1024, 4), (*of_heads, 8)]
        operands = [jax.ShapeDtypeStruct(shape, f32) for shape in shapes]
        segments = jnp.zeros((1, 1024), jnp.int32)

        def both_passes(*a):
            (out, max_logit), pull_back = jax.vjp(
                lambda *a: mla_attention(*a, segments, scale=SCALE, implementation=implementation),
                *a,
            )
            return pull_back((out, max_logit))

        program = jax.jit(both_passes).lower(*operands).compile().as_text()
        self.assertEqual(bool(re.search(r"\[(\d+,)*1024,1024\]", program)), holds)

    def test_operands_that_do_not_fit_raise(self):
        operands, segments, _ = attention_inputs(cases.TOY["one_block"])
        arrays = [jnp.asarray(a, jnp.float32) for a in operands]
        arrays[3] = arrays[3].astype(jnp.bfloat16)
        with self.assertRaisesRegex(ValueError, "operands must have one dtype"):
            mla_attention(*arrays, jnp.asarray(segments, jnp.int32), scale=SCALE)


if __name__ == "__main__":
    absltest.main()
