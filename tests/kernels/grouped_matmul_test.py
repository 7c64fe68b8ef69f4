import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.grouped_matmul import cases, grouped_matmul, pallas_tpu
from kimi_jax.kernels.grouped_matmul.gradients import differentiable
from kimi_jax.quantization import int4
from kimi_jax.quantization.fake_quant import FakeQuantized
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)
from tests.support.grouped_pallas import interpreted

# Several tiles, and several parts of one, in the smallest sizes that a kernel takes.
_SMALL_TILES = {"rows": 64, "part": 32, "columns": 128, "inputs": 128, "outputs": 128}
_XLA, _REFERENCE = (
    functools.partial(grouped_matmul, implementation=implementation)
    for implementation in (Implementation.XLA, Implementation.REFERENCE)
)
_PALLAS = interpreted(tiles=_SMALL_TILES)


def _oracle(x, w, group_sizes, d_y):
    """The product and its gradients by a one-hot einsum in float64."""
    member = np.zeros((x.shape[0], w.shape[0]))
    start = 0
    for group, size in enumerate(group_sizes):
        member[start : start + size, group] = 1.0
        start += size
    y = np.einsum("ae,ak,ekn->an", member, x, w)
    return y, np.einsum("ae,an,ekn->ak", member, d_y, w), np.einsum("ae,ak,an->ekn", member, x, d_y)


def _inputs(case):
    rng = np.random.default_rng(0)
    rows = sum(case.group_sizes) + case.spare_rows
    x = rng.standard_normal((rows, case.inputs))
    w = rng.standard_normal((len(case.group_sizes), case.inputs, case.outputs))
    return x, w, rng.standard_normal((rows, case.outputs))


def _packed(w):
    """Packs, and returns the values as float64, too, by a way that shares nothing with kernels."""
    packed = int4.quantize(jnp.asarray(w, jnp.float32))
    words = np.asarray(packed.codes).view(np.uint32)
    nibbles = np.stack([(words >> (4 * i)) & 15 for i in range(8)], axis=2)
    codes = nibbles.reshape(w.shape).astype(np.float64) - 8
    return packed, codes * np.repeat(np.asarray(packed.scales, np.float64), 32, axis=1)


class GroupedMatmulTest(parameterized.TestCase):
    @parameterized.product(name=list(cases.TOY), multiply=[_XLA, _REFERENCE, _PALLAS])
    def test_product_and_gradients_equal_float64(self, name, multiply):
        case = cases.TOY[name]
        x, w, d_y = _inputs(case)
        self._check(multiply, case, x, w, d_y, jnp.float32, FLOAT32_TOLERANCE)

    @parameterized.parameters(_XLA, _PALLAS)
    def test_bfloat16_product_and_gradients_are_near_float64(self, multiply):
        case = cases.TOY["odd_sizes_and_spare_rows"]
        x, w, d_y = _inputs(case)
        self._check(multiply, case, x, w, d_y, jnp.bfloat16, BFLOAT16_TOLERANCE)

    def _check(self, multiply, case, x, w, d_y, dtype, tolerance):
        sizes = jnp.asarray(case.group_sizes, jnp.int32)
        value, gradients = value_and_gradients(
            lambda x, w: multiply(x, w, sizes),
            (jnp.asarray(x, dtype), jnp.asarray(w, dtype)),
            jnp.asarray(d_y, dtype),
        )
        for actual, expected in zip(
            (value, *gradients), _oracle(x, w, case.group_sizes, d_y), strict=True
        ):
            self.assertEqual(actual.dtype, dtype)
            assert_close(actual, expected, tolerance)

    @parameterized.product(name=list(cases.TOY_INT4), multiply=[_XLA, _REFERENCE, _PALLAS])
    def test_packed_weights_equal_float64_and_their_gradient_goes_to_the_carrier(
        self, name, multiply
    ):
        case = cases.TOY_INT4[name]
        x, w, d_y = _inputs(case)
        packed, w = _packed(w)
        sizes = jnp.asarray(case.group_sizes, jnp.int32)
        value, (d_x, d_carrier) = value_and_gradients(
            lambda x, carrier, w: multiply(x, FakeQuantized(carrier=carrier, quantized=w), sizes),
            (jnp.asarray(x, jnp.float32), jnp.full(w.shape, jnp.nan)),
            jnp.asarray(d_y, jnp.float32),
            fixed=(packed,),
        )
        expected = _oracle(x, w, case.group_sizes, d_y)
        for a, b in zip((value, d_x, d_carrier), expected, strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    @parameterized.parameters((_XLA, None), (_PALLAS, "v5p"), (_PALLAS, "v6e"))
    def test_packed_weights_alone_give_the_bits_of_the_unpacked_ones_and_get_no_gradient(
        self, multiply, chip
    ):
        # The first chip dequantises in float32, the second in bfloat16.
        self.enterContext(mock.patch.object(pallas_tpu, "target_chip", return_value=chip))
        case = cases.TOY_INT4["odd_sizes_and_spare_rows_int4"]
        x, w, d_y = (jnp.asarray(a, jnp.bfloat16) for a in _inputs(case))
        packed = int4.quantize(w)
        sizes = jnp.asarray(case.group_sizes, jnp.int32)
        results = [
            value_and_gradients(lambda x, w: multiply(x, w, sizes), (x,), d_y, fixed=(weight,))
            for weight in (packed, int4.dequantize(packed, jnp.bfloat16))
        ]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_array_equal(a, b)

    @parameterized.parameters(
        ((0, 0, 0), 40), ((64, 0, 64, 1), 0), ((5, 59, 128), 3), ((300,), 0), ((1,) * 9, 200)
    )
    def test_groups_that_end_with_tiles_and_tiles_without_rows(self, group_sizes, spare_rows):
        case = cases.Case(group_sizes=group_sizes, spare_rows=spare_rows, inputs=4, outputs=3)
        x, w, d_y = _inputs(case)
        self._check(_PALLAS, case, x, w, d_y, jnp.float32, FLOAT32_TOLERANCE)

    @parameterized.parameters(_XLA, _PALLAS)
    def test_rows_of_no_group_cannot_reach_the_result(self, multiply):
        x, d_y = (jnp.ones((5, n)).at[2:].set(jnp.nan) for n in (3, 4))
        w, sizes = jnp.ones((2, 3, 4)), jnp.array([1, 1], jnp.int32)
        y, (d_x, d_w) = value_and_gradients(lambda x, w: multiply(x, w, sizes), (x, w), d_y)
        np.testing.assert_array_equal(y[2:], 0.0)
        np.testing.assert_array_equal(d_x[2:], 0.0)
        np.testing.assert_array_equal(d_w, 1.0)

    @parameterized.parameters(_XLA, _PALLAS)
    def test_gradients_with_replicated_matrices_in_shard_map_equal_the_unsharded_ones(
        self, multiply
    ):
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.standard_normal((4, 30, 6)), jnp.float32)
        w = jnp.asarray(rng.standard_normal((3, 6, 5)), jnp.float32)
        d_y = jnp.asarray(rng.standard_normal((4, 30, 5)), jnp.float32)
        sizes = jnp.asarray([[10, 15, 5], [0, 30, 0], [1, 1, 1], [30, 0, 0]], jnp.int32)
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))

        def shard(x, w, sizes):
            return multiply(x[0], w, sizes[0])[None]

        with jax.set_mesh(mesh):
            sharded = jax.shard_map(
                shard, in_specs=(P("d"), P(), P("d")), out_specs=P("d"), check_vma=False
            )
            actual = value_and_gradients(
                lambda x, w: sharded(x, w, jax.reshard(sizes, P("d"))),
                (jax.reshard(x, P("d")), jax.reshard(w, P())),
                jax.reshard(d_y, P("d")),
            )
        expected = value_and_gradients(
            lambda x, w: jnp.stack([_XLA(x[i], w, sizes[i]) for i in range(4)]),
            (x, w),
            d_y,
        )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_where_no_gradient_is_asked_for_a_carrier_is_not_read_either(self):
        pieces = 3 * [lambda x, w, sizes: x @ w.codes[0]]
        multiply = differentiable(*pieces)
        w = FakeQuantized(carrier=None, quantized=int4.quantize(jnp.ones((1, 32, 4))))
        y = multiply(jnp.ones((2, 4), jnp.int32), w, jnp.array([2]))
        np.testing.assert_array_equal(y, jnp.ones((2, 4), jnp.int32) @ w.quantized.codes[0])

    def test_a_matrix_is_dequantised_once_however_many_tiles_of_rows_its_group_has(self):
        dequantised = []
        dequantise = pallas_tpu._dequantise

        def counted(codes, scales, dtype):
            jax.debug.callback(lambda: dequantised.append(dtype))
            return dequantise(codes, scales, dtype)

        w = int4.quantize(jnp.ones((3, 32, 128)))
        x, sizes = jnp.ones((100, 32)), jnp.array([80, 0, 20])
        with mock.patch.object(pallas_tpu, "_dequantise", counted):
            y = pallas_tpu.forward(x, w, sizes, tiles=_SMALL_TILES, interpret=True)
        jax.effects_barrier()
        np.testing.assert_allclose(y, 32.0, rtol=0.01)
        self.assertLen(dequantised, 2)

    def test_a_tile_table_cannot_ask_for_more_than_there_is(self):
        x, w = jnp.ones((5, 3)), jnp.ones((1, 3, 4))
        y = pallas_tpu.forward(x, w, jnp.array([4]), interpret=True)
        np.testing.assert_array_equal(y, np.repeat([3.0, 0.0], [4, 1])[:, None] * np.ones(4))

    def test_a_kernel_for_tpus_raises_elsewhere(self):
        with self.assertRaisesRegex(NotImplementedError, "runs on a TPU"):
            grouped_matmul(
                jnp.ones((5, 3)),
                jnp.ones((1, 3, 4)),
                jnp.array([4]),
                implementation=Implementation.PALLAS_TPU,
            )

    def test_operands_of_two_dtypes_raise(self):
        with self.assertRaisesRegex(ValueError, "operands must have one dtype"):
            grouped_matmul(
                jnp.ones((4, 3)), jnp.ones((1, 3, 5), jnp.bfloat16), jnp.ones(1, jnp.int32)
            )


if __name__ == "__main__":
    absltest.main()
