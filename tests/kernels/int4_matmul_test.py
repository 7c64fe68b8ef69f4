import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.int4_matmul import cases, int4_matmul, pallas_tpu, xla
from kimi_jax.parallel.per_shard import per_shard
from kimi_jax.quantization.int4 import Int4Weight
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)

_KERNEL = functools.partial(pallas_tpu.int4_matmul, interpret=True)
_SMALL_TILES = {"rows": 16, "outputs": 128}
_CHIPS = ("v5p", "v6e")  # the first computes in float32, the second in bfloat16


def _written_out(w):
    """The weight in float64: nibbles taken apart, lowest first, times their group's scale."""
    words = np.asarray(w.codes).view(np.uint32)
    codes = (words[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[:, None]) & 15
    codes = codes.astype(np.float64).reshape(-1, words.shape[1]) - 8
    scales = np.asarray(w.scales).astype(np.float64)
    return codes * np.repeat(scales, codes.shape[0] // scales.shape[0], axis=0)


def _inputs(case, dtype):
    operands = jax.jit(lambda: cases.operands(case, jax.random.key(3)))()
    d_y = jax.random.normal(jax.random.key(4), (case.rows, case.outputs))
    return operands["x"].astype(dtype), operands["w"], d_y.astype(dtype)


class Int4MatmulTest(parameterized.TestCase):
    @parameterized.product(name=list(cases.TOY), implementation=["kernel", "xla", "reference"])
    def test_product_and_gradient_equal_float64(self, name, implementation):
        x, w, d_y = _inputs(cases.TOY[name], jnp.float32)
        fn = _KERNEL
        if implementation != "kernel":
            fn = functools.partial(int4_matmul, implementation=Implementation(implementation))
        self._check(fn, x, w, d_y, FLOAT32_TOLERANCE)

    def test_bfloat16_product_and_gradient_are_near_float64(self):
        x, w, d_y = _inputs(cases.TOY["odd_rows_and_outputs"], jnp.bfloat16)
        self._check(_KERNEL, x, w, d_y, BFLOAT16_TOLERANCE)

    def test_a_weight_made_once_serves_all_tiles_of_rows(self):
        x, w, d_y = _inputs(cases.TOY["two_tiles_each_way"], jnp.float32)
        fn = functools.partial(_KERNEL, tiles=_SMALL_TILES)
        self._check(fn, x, w, d_y, FLOAT32_TOLERANCE)
        d_x = pallas_tpu.int4_matmul_transposed(d_y, w, tiles=_SMALL_TILES, interpret=True)
        assert_close(d_x, np.asarray(d_y) @ _written_out(w).T, FLOAT32_TOLERANCE)

    def _check(self, fn, x, w, d_y, tolerance):
        value, (d_x,) = value_and_gradients(fn, (x,), d_y, fixed=(w,))
        matrix = _written_out(w)
        x, d_y = (np.asarray(a, np.float64) for a in (x, d_y))
        assert_close(value, x @ matrix, tolerance)
        assert_close(d_x, d_y @ matrix.T, tolerance)

    @parameterized.parameters(*_CHIPS)
    def test_every_code_and_its_scale_come_out_exactly(self, chip):
        codes = np.arange(256 * 128).reshape(256, 128) % 15 - 7
        words = ((codes + 8).reshape(32, 8, 128) << (4 * np.arange(8))[:, None]).sum(1)
        scales = jax.random.uniform(jax.random.key(5), (8, 128), jnp.bfloat16, 0.5, 2.0)
        w = Int4Weight(codes=jnp.asarray(words.astype(np.uint32).view(np.int32)), scales=scales)
        with mock.patch.object(pallas_tpu, "target_chip", return_value=chip):
            actual = _KERNEL(jnp.eye(256, dtype=jnp.bfloat16), w)
        expected = (codes * np.repeat(np.asarray(scales, np.float32), 32, axis=0)).astype(
            jnp.bfloat16
        )
        np.testing.assert_array_equal(actual, expected)

    def test_gradients_with_a_replicated_weight_in_per_shard_equal_the_unsharded_ones(self):
        x, w, d_y = _inputs(cases.TOY["two_tiles_each_way"], jnp.float32)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            sharded = per_shard(_KERNEL, in_specs=(P("data"), P()), out_specs=P("data"))
            actual = value_and_gradients(
                sharded,
                (jax.reshard(x, P("data")),),
                jax.reshard(d_y, P("data")),
                fixed=(jax.reshard(w, P()),),
            )
        expected = value_and_gradients(xla.int4_matmul, (x,), d_y, fixed=(w,))
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_a_named_kernel_refuses_another_platform(self):
        x, w, _ = _inputs(cases.TOY["one_row"], jnp.float32)
        with self.assertRaisesRegex(NotImplementedError, "runs on a TPU"):
            int4_matmul(x, w, implementation=Implementation.PALLAS_TPU)

    def test_rows_that_do_not_fit_the_weight_raise(self):
        _, w, _ = _inputs(cases.TOY["one_row"], jnp.float32)
        with self.assertRaisesRegex(ValueError, "K = "):
            int4_matmul(jnp.ones((2, 5)), w)


if __name__ == "__main__":
    absltest.main()
