import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.grouped_swiglu import cases, grouped_swiglu
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)
from tests.support.swiglu_oracle import swiglu_oracle

_XLA = (Implementation.XLA, Implementation.XLA_ACCELERATOR)


def _inputs(case):
    """Float64 operands (x, w_gate, w_up, w_down, weights), expert ids, and a cotangent."""
    rng = np.random.default_rng(0)
    everywhere = max(case.experts, case.per_token)
    ids = np.stack([rng.permutation(everywhere)[: case.per_token] for _ in range(case.tokens)])
    elsewhere = rng.random(ids.shape) < case.absent
    ids = np.where(elsewhere, rng.choice([-3, case.experts, 999], ids.shape), ids)
    width = (case.experts, case.embed, case.inner)
    operands = [
        rng.standard_normal((case.tokens, case.embed)),
        rng.standard_normal(width) / case.embed**0.5,
        rng.standard_normal(width) / case.embed**0.5,
        rng.standard_normal((case.experts, case.inner, case.embed)) / case.inner**0.5,
        rng.random(ids.shape),
    ]
    return operands, ids, rng.standard_normal((case.tokens, case.embed))


def _run(operands, ids, d_y, dtype, implementation=Implementation.XLA):
    *arrays, weights = operands
    arguments = (*(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(weights, jnp.float32))
    ids = jnp.asarray(ids, jnp.int32)

    def run(x, w_gate, w_up, w_down, weights, ids):
        return grouped_swiglu(x, w_gate, w_up, w_down, ids, weights, implementation=implementation)

    return value_and_gradients(run, arguments, jnp.asarray(d_y, dtype), fixed=(ids,))


class GroupedSwigluTest(parameterized.TestCase):
    @parameterized.product(
        name=list(cases.TOY),
        implementation=[
            Implementation.XLA,
            Implementation.XLA_ACCELERATOR,
            Implementation.REFERENCE,
        ],
    )
    def test_sum_and_gradients_equal_a_loop_over_experts_in_float64(self, name, implementation):
        operands, ids, d_y = _inputs(cases.TOY[name])
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    @parameterized.parameters(*_XLA)
    def test_all_tokens_to_one_expert(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        ids = np.stack([np.full(len(ids), 1), np.full(len(ids), -1)], axis=1)
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    @parameterized.parameters(*_XLA)
    def test_one_expert_twice_for_a_token_counts_twice(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        ids = np.zeros_like(ids)
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    @parameterized.parameters(*_XLA)
    def test_bfloat16_sum_and_gradients_are_near_float64(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        self._check(operands, ids, d_y, jnp.bfloat16, BFLOAT16_TOLERANCE, implementation)

    def _check(self, operands, ids, d_y, dtype, tolerance, implementation=Implementation.XLA):
        actual = jax.tree.leaves(_run(operands, ids, d_y, dtype, implementation))
        expected = swiglu_oracle(operands, ids, d_y)
        self.assertEqual([a.dtype for a in actual], [dtype] * 5 + [jnp.float32])
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, tolerance)

    @parameterized.parameters(*_XLA)
    def test_an_absent_assignment_changes_nothing_even_where_all_it_has_is_infinite(
        self, implementation
    ):
        operands, _, d_y = _inputs(cases.TOY["odd_sizes"])
        ids = np.full((37, 3), 7)
        ids[0] = [0, 7, 1]
        operands[0][1:], operands[4][1:], d_y[1:] = np.inf, np.inf, np.inf
        y, gradients = _run(operands, ids, d_y, jnp.float32, implementation)
        np.testing.assert_array_equal(y[1:], 0.0)
        np.testing.assert_array_equal(gradients[0][1:], 0.0)
        self.assertTrue(all(np.all(np.isfinite(g)) for g in gradients))

    def test_gradients_in_shard_map_with_replicated_weights_equal_the_unsharded_ones(self):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        operands = [jnp.asarray(a[:16] if a.ndim == 2 else a, jnp.float32) for a in operands]
        ids, d_y = jnp.asarray(ids[:16], jnp.int32), jnp.asarray(d_y[:16], jnp.float32)
        split = (P("d"), P(), P(), P(), P("d"))

        def run(x, w_gate, w_up, w_down, weights, ids):
            return grouped_swiglu(x, w_gate, w_up, w_down, ids, weights)

        expected = value_and_gradients(run, tuple(operands), d_y, fixed=(ids,))
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharded = jax.shard_map(
                run, in_specs=(*split, P("d")), out_specs=P("d"), check_vma=False
            )
            actual = value_and_gradients(
                sharded,
                tuple(map(jax.reshard, operands, split)),
                jax.reshard(d_y, P("d")),
                fixed=(jax.reshard(ids, P("d")),),
            )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_the_loops_copy_no_stacked_gradient(self):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        *arrays, weights = (jnp.asarray(a, jnp.float32) for a in operands)

        def backward(x, w_gate, w_up, w_down, weights, d_y):
            def run(*a):
                return grouped_swiglu(*a[:4], jnp.asarray(ids, jnp.int32), a[4])

            return jax.vjp(run, x, w_gate, w_up, w_down, weights)[1](d_y)

        program = jax.jit(backward).lower(*arrays, weights, jnp.asarray(d_y, jnp.float32))
        bodies = program.compile().as_text().split("ENTRY")[0]
        self.assertIn("while", program.as_text())
        stacked = [f"f32[{','.join(map(str, w.shape))}]" for w in arrays[1:]]
        copies = [
            line
            for line in bodies.splitlines()
            if " copy(" in line and any(shape in line.split(" copy(")[0] for shape in stacked)
        ]
        self.assertEmpty(copies)

    def test_more_assignments_than_sort_keys_raise(self):
        tokens = 2**28
        shapes = [(tokens, 1), (7, 1, 1), (7, 1, 1), (7, 1, 1)]
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        ids = jax.ShapeDtypeStruct((tokens, 1), jnp.int32)
        weights = jax.ShapeDtypeStruct((tokens, 1), jnp.float32)
        with self.assertRaisesRegex(ValueError, "do not fit int32 sort keys"):
            jax.eval_shape(grouped_swiglu, *operands, ids, weights)


if __name__ == "__main__":
    absltest.main()
