import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.int4_fake_quant import cases, int4_fake_quant, pallas_tpu, xla
from kimi_jax.parallel.per_shard import per_shard
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)

_SMALL_TILES = {"rows": 16, "outputs": 128}


def _kernel(x, w, group_size=32, **options):
    return pallas_tpu.int4_fake_quant(x, w, group_size, interpret=True, **options)


def _rounded(w, group_size):
    """The weight on its grid, as the rule says it, in numpy: values of bfloat16."""
    groups = np.asarray(w, np.float32).reshape(-1, group_size, w.shape[1])
    scales = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / np.float32(7), 1e-5)
    scales = scales.astype(jnp.bfloat16).astype(np.float32)
    values = np.clip(np.rint(groups / scales), -7, 7) * scales
    return values.reshape(w.shape)


def _inputs(case, dtype=jnp.float32):
    operands = jax.jit(lambda: cases.operands(case, jax.random.key(3)))()
    d_y = jax.random.normal(jax.random.key(4), (case.rows, case.outputs))
    return operands["x"].astype(dtype), operands["w"], d_y.astype(dtype)


class Int4FakeQuantTest(parameterized.TestCase):
    @parameterized.product(name=list(cases.TOY), implementation=["kernel", "xla", "reference"])
    def test_product_and_gradients_equal_float64(self, name, implementation):
        case = cases.TOY[name]
        fn = _kernel
        if implementation != "kernel":
            fn = functools.partial(int4_fake_quant, implementation=Implementation(implementation))
        fn = functools.partial(fn, group_size=case.group_size)
        self._check(fn, *_inputs(case), case.group_size, FLOAT32_TOLERANCE)

    def test_bfloat16_product_and_gradients_are_near_float64(self):
        inputs = _inputs(cases.TOY["odd_rows_and_outputs"], jnp.bfloat16)
        self._check(_kernel, *inputs, 32, BFLOAT16_TOLERANCE)

    def test_a_weight_rounded_once_serves_all_tiles_of_rows(self):
        x, w, d_y = _inputs(cases.TOY["two_tiles_each_way"])
        fn = functools.partial(_kernel, tiles=_SMALL_TILES)
        self._check(fn, x, w, d_y, 32, FLOAT32_TOLERANCE)
        d_x = pallas_tpu.int4_fake_quant_transposed(d_y, w, 32, tiles=_SMALL_TILES, interpret=True)
        assert_close(d_x, np.asarray(d_y) @ _rounded(w, 32).T, FLOAT32_TOLERANCE)

    def _check(self, fn, x, w, d_y, group_size, tolerance):
        value, (d_x, d_w) = value_and_gradients(fn, (x, w), d_y)
        self.assertEqual(d_w.dtype, w.dtype)
        matrix = _rounded(w, group_size)
        x, d_y = (np.asarray(a, np.float64) for a in (x, d_y))
        assert_close(value, x @ matrix, tolerance)
        assert_close(d_x, d_y @ matrix.T, tolerance)
        assert_close(d_w, x.T @ d_y, BFLOAT16_TOLERANCE)

    @parameterized.parameters(
        (jnp.bfloat16, "v5p"), (jnp.float32, "v5p"), (jnp.bfloat16, "v6e"), (jnp.float32, "v6e")
    )
    def test_the_rounded_weight_is_the_rules_to_the_last_bit(self, dtype, chip):
        # Multiplied with the identity, the weight itself comes out. Halves of small multiples of
        # the scale are ties, which a reciprocal gets wrong.
        w = 0.1 * jax.random.normal(jax.random.key(5), (256, 256), dtype)
        ties = jnp.arange(-7, 8, dtype=dtype) * 0.5
        scale = (1 + jnp.arange(256) % 64 / 64).astype(dtype)
        w = w.at[:15].set(ties[:, None] * scale).at[15].set(7 * scale)
        # The first chip finds the largest weights in float32, the second in bfloat16.
        with mock.patch.object(pallas_tpu, "target_chip", return_value=chip):
            actual = _kernel(jnp.eye(256, dtype=jnp.bfloat16), w)
        expected = _rounded(w.astype(jnp.bfloat16), 32)
        np.testing.assert_array_equal(actual, expected.astype(jnp.bfloat16))

    def test_the_chips_rounding_is_to_the_nearest_code_ties_to_even(self):
        quotients = np.linspace(-7.04, 7.04, 200_001, dtype=np.float32)
        quotients = np.concatenate([quotients, np.arange(-7, 7.5, 0.5, dtype=np.float32)])
        grid = np.rint(quotients * 4096) / np.float32(4096)
        for interpret in (False, True):  # not compiled together, additions stay as they are
            actual = pallas_tpu._nearest_codes(jnp.asarray(quotients), interpret=interpret)
            np.testing.assert_array_equal(actual, np.rint(grid))

    def test_gradients_with_a_replicated_weight_in_per_shard_equal_the_unsharded_ones(self):
        x, w, d_y = _inputs(cases.TOY["two_tiles_each_way"])
        w = w.astype(jnp.float32)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharded = per_shard(_kernel, in_specs=(P("data"), P()), out_specs=P("data"))
            actual = value_and_gradients(
                sharded,
                (jax.reshard(x, P("data")), jax.reshard(w, P())),
                jax.reshard(d_y, P("data")),
            )
        expected = value_and_gradients(
            functools.partial(xla.int4_fake_quant, group_size=32), (x, w), d_y
        )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_groups_that_do_not_divide_the_inputs_raise(self):
        with self.assertRaisesRegex(ValueError, "groups of 32 do not divide 40 inputs"):
            int4_fake_quant(jnp.ones((2, 40)), jnp.ones((40, 8)))


if __name__ == "__main__":
    absltest.main()
