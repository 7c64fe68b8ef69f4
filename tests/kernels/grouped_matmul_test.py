import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.compute import Implementation
from kimi_jax.kernels.grouped_matmul import cases, grouped_matmul
from tests.support.gradients import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    assert_close,
    value_and_gradients,
)


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


class GroupedMatmulTest(parameterized.TestCase):
    @parameterized.product(
        name=list(cases.TOY), implementation=[Implementation.XLA, Implementation.REFERENCE]
    )
    def test_product_and_gradients_equal_float64(self, name, implementation):
        case = cases.TOY[name]
        x, w, d_y = _inputs(case)
        self._check(x, w, case.group_sizes, d_y, jnp.float32, FLOAT32_TOLERANCE, implementation)

    def test_bfloat16_product_and_gradients_are_near_float64(self):
        case = cases.TOY["odd_sizes_and_spare_rows"]
        x, w, d_y = _inputs(case)
        self._check(
            x, w, case.group_sizes, d_y, jnp.bfloat16, BFLOAT16_TOLERANCE, Implementation.XLA
        )

    def _check(self, x, w, group_sizes, d_y, dtype, tolerance, implementation):
        sizes = jnp.asarray(group_sizes, jnp.int32)
        value, gradients = value_and_gradients(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation),
            (jnp.asarray(x, dtype), jnp.asarray(w, dtype)),
            jnp.asarray(d_y, dtype),
        )
        for actual, expected in zip(
            (value, *gradients), _oracle(x, w, group_sizes, d_y), strict=True
        ):
            self.assertEqual(actual.dtype, dtype)
            assert_close(actual, expected, tolerance)

    def test_rows_of_no_group_cannot_reach_the_result(self):
        x, d_y = (jnp.ones((5, n)).at[2:].set(jnp.nan) for n in (3, 4))
        w, sizes = jnp.ones((2, 3, 4)), jnp.array([1, 1], jnp.int32)
        y, (d_x, d_w) = value_and_gradients(lambda x, w: grouped_matmul(x, w, sizes), (x, w), d_y)
        np.testing.assert_array_equal(y[2:], 0.0)
        np.testing.assert_array_equal(d_x[2:], 0.0)
        np.testing.assert_array_equal(d_w, 1.0)

    def test_gradients_with_replicated_matrices_in_shard_map_equal_the_unsharded_ones(self):
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.standard_normal((4, 30, 6)), jnp.float32)
        w = jnp.asarray(rng.standard_normal((3, 6, 5)), jnp.float32)
        d_y = jnp.asarray(rng.standard_normal((4, 30, 5)), jnp.float32)
        sizes = jnp.asarray([[10, 15, 5], [0, 30, 0], [1, 1, 1], [30, 0, 0]], jnp.int32)
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))

        def shard(x, w, sizes):
            return grouped_matmul(x[0], w, sizes[0])[None]

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
            lambda x, w: jnp.stack([grouped_matmul(x[i], w, sizes[i]) for i in range(4)]),
            (x, w),
            d_y,
        )
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, FLOAT32_TOLERANCE)

    def test_operands_of_two_dtypes_raise(self):
        with self.assertRaisesRegex(ValueError, "operands must have one dtype"):
            grouped_matmul(
                jnp.ones((4, 3)), jnp.ones((1, 3, 5), jnp.bfloat16), jnp.ones(1, jnp.int32)
            )


if __name__ == "__main__":
    absltest.main()
