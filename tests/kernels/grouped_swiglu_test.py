import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation, ResidualFormat
from kimi_jax.kernels.grouped_swiglu import cases, grouped_swiglu, xla_accelerator
from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import FakeQuantized
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)
from tests.support.grouped_pallas import interpreted
from tests.support.swiglu_oracle import swiglu_oracle

_XLA = (Implementation.XLA, Implementation.XLA_ACCELERATOR)
_WITH_PALLAS = (*_XLA, Implementation.PALLAS_TPU)
_KEEP_ALL_NAMED = jax.checkpoint_policies.save_only_these_names(
    "expert_inputs", "expert_gate", "expert_up", "expert_gate_and_up"
)


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


def _inputs_with_exact_scales():
    """Operands whose rows, gate and up products reach +-3.5 in every tile of 128.

    The largest code is 448 = 3.5 * 2**7, so every scale is 2**-7; and all values are short binary
    fractions, which float32 holds. So the codes are the same in float64, ties included.
    """
    rng = np.random.default_rng(3)
    tokens, embed, inner, experts, per_token = 40, 144, 130, 3, 2

    def products():
        w = rng.integers(-4, 5, (experts, embed, inner)) / 256
        w[:, :, ::128] = 0
        w[:, 0, ::128] = 1  # copies the largest value of x
        return w

    x = rng.integers(-48, 49, (tokens, embed)) / 16
    x[:, ::128] = rng.choice([-3.5, 3.5], (tokens, 1))
    operands = [
        x,
        products(),
        products(),
        rng.standard_normal((experts, inner, embed)) / inner**0.5,
        rng.random((tokens, per_token)),
    ]
    for w in operands[1:3]:
        assert np.all(np.abs(x @ w) <= 3.5)
    ids = np.stack([rng.permutation(experts + 1)[:per_token] for _ in range(tokens)])
    return operands, ids, rng.standard_normal((tokens, embed))


def _stored_as_fp8(rows):
    return (rows * 2.0**7).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**-7


def _swiglu(*operands, implementation, residuals=ResidualFormat.COMPUTE):
    """The public function, or what it does with the TPU's kernels, interpreted."""
    if implementation is not Implementation.PALLAS_TPU:
        return grouped_swiglu(*operands, implementation=implementation, residuals=residuals)
    tiles = {"rows": 128, "part": 32, "columns": 128, "inputs": 128, "outputs": 128}
    return xla_accelerator.grouped_swiglu(*operands, residuals, interpreted(tiles=tiles))


def _function(ids, implementation, residuals):
    ids = jnp.asarray(ids, jnp.int32)

    def run(x, w_gate, w_up, w_down, weights):
        return _swiglu(
            x,
            w_gate,
            w_up,
            w_down,
            ids,
            weights,
            implementation=implementation,
            residuals=residuals,
        )

    return run


def _run(operands, ids, d_y, dtype, implementation=Implementation.XLA):
    *arrays, weights = operands
    arguments = (*(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(weights, jnp.float32))
    ids = jnp.asarray(ids, jnp.int32)

    def run(x, w_gate, w_up, w_down, weights, ids):
        return _swiglu(x, w_gate, w_up, w_down, ids, weights, implementation=implementation)

    return value_and_gradients(run, arguments, jnp.asarray(d_y, dtype), fixed=(ids,))


def _residuals(fn, *arguments):
    """Shapes of everything that `jax.vjp` of a function keeps, but its arguments."""
    pull_back = jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *arguments)
    return jax.tree.leaves(pull_back)


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

    @parameterized.parameters("several_tiles", "most_experts_elsewhere", "all_experts_elsewhere")
    def test_the_kernels_for_tpus_give_the_same_sum_and_gradients(self, name):
        operands, ids, d_y = _inputs(cases.TOY[name])
        pallas = Implementation.PALLAS_TPU
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, pallas)

    @parameterized.parameters(*_XLA)
    def test_all_tokens_to_one_expert(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        ids = np.stack([np.full(len(ids), 1), np.full(len(ids), -1)], axis=1)
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    @parameterized.parameters(*_WITH_PALLAS, Implementation.REFERENCE)
    def test_packed_weights_count_as_their_values_and_gradients_go_to_the_carriers(
        self, implementation
    ):
        case = cases.Case(tokens=37, embed=64, inner=32, experts=5, per_token=3, absent=0.3)
        operands, ids, d_y = _inputs(case)
        packed = tuple(int4.quantize(jnp.asarray(w, jnp.float32)) for w in operands[1:4])
        operands[1:4] = (np.asarray(int4.dequantize(w, jnp.float32), np.float64) for w in packed)
        run = _function(ids, implementation, ResidualFormat.COMPUTE)

        def run_packed(x, carriers, weights, packed):
            stored = map(lambda c, q: FakeQuantized(carrier=c, quantized=q), carriers, packed)
            return run(x, *stored, weights)

        x, weights, d_y_cast = (jnp.asarray(a, jnp.float32) for a in (*operands[::4], d_y))
        never_read = tuple(jnp.full(w.shape, jnp.nan) for w in packed)
        actual = value_and_gradients(run_packed, (x, never_read, weights), d_y_cast, (packed,))
        expected = swiglu_oracle(operands, ids, d_y)
        for a, b in zip(jax.tree.leaves(actual), expected, strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    @parameterized.parameters(*_XLA)
    def test_one_expert_twice_for_a_token_counts_twice(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        ids = np.zeros_like(ids)
        self._check(operands, ids, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    @parameterized.parameters(*_WITH_PALLAS)
    def test_bfloat16_sum_and_gradients_are_near_float64(self, implementation):
        operands, ids, d_y = _inputs(cases.TOY["several_tiles"])
        self._check(operands, ids, d_y, jnp.bfloat16, BFLOAT16_TOLERANCE, implementation)

    def _check(self, operands, ids, d_y, dtype, tolerance, implementation=Implementation.XLA):
        actual = jax.tree.leaves(_run(operands, ids, d_y, dtype, implementation))
        expected = swiglu_oracle(operands, ids, d_y)
        self.assertEqual([a.dtype for a in actual], [dtype] * 5 + [jnp.float32])
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, tolerance)

    @parameterized.parameters(*_WITH_PALLAS)
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

    @parameterized.parameters(*_WITH_PALLAS)
    def test_gradients_with_fp8_residuals_are_those_of_the_rounded_values(self, implementation):
        operands, ids, d_y = _inputs_with_exact_scales()
        run = _function(ids, implementation, ResidualFormat.FP8)
        arrays = tuple(jnp.asarray(a, jnp.float32) for a in operands)
        actual = jax.tree.leaves(value_and_gradients(run, arrays, jnp.asarray(d_y, jnp.float32)))
        expected = swiglu_oracle(operands, ids, d_y, _stored_as_fp8)
        exact = swiglu_oracle(operands, ids, d_y)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)
        for rounded, not_rounded in zip(expected[1:], exact[1:], strict=True):
            self.assertGreater(np.max(np.abs(rounded - not_rounded)), 1e-3)

    @parameterized.product(implementation=_XLA, dtype=[jnp.float32, jnp.bfloat16])
    def test_fp8_residuals_change_no_bit_of_the_result(self, implementation, dtype):
        operands, ids, d_y = _inputs(cases.TOY["odd_sizes"])
        *arrays, weights = operands
        arrays = (*(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(weights, jnp.float32))
        kept, coded = (
            value_and_gradients(
                _function(ids, implementation, residuals), arrays, jnp.asarray(d_y, dtype)
            )
            for residuals in (ResidualFormat.COMPUTE, ResidualFormat.FP8)
        )
        np.testing.assert_array_equal(kept[0], coded[0])
        self.assertFalse(np.array_equal(kept[1][1], coded[1][1]))

    @parameterized.product(implementation=_XLA, policy=[None, _KEEP_ALL_NAMED])
    def test_what_waits_for_the_backward_pass_is_codes_and_scales(self, implementation, policy):
        case = cases.TOY["several_tiles"]
        operands, ids, _ = _inputs(case)
        arrays = [jnp.asarray(a, jnp.bfloat16) for a in operands]
        for residuals in ResidualFormat:
            run = _function(ids, implementation, residuals)
            if policy:
                run = jax.checkpoint(run, policy=policy)
            kept = [
                a
                for a in _residuals(run, *arrays)
                if jnp.issubdtype(a.dtype, jnp.floating)
                and a.ndim > 1
                and a.shape[0] >= case.tokens
                and a.shape[-1] >= case.inner
            ]
            self.assertNotEmpty(kept)
            in_fp8 = {a.dtype == jnp.float8_e4m3fn for a in kept}
            self.assertEqual(in_fp8, {residuals is ResidualFormat.FP8})

    def test_the_reference_keeps_no_fp8(self):
        operands, ids, _ = _inputs(cases.TOY["one_token"])
        run = _function(ids, Implementation.REFERENCE, ResidualFormat.FP8)
        with self.assertRaisesRegex(NotImplementedError, "choose another compute.implementation"):
            run(*(jnp.asarray(a, jnp.float32) for a in operands))

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
