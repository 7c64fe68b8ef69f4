import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.parallel.collectives import (
    first_of_tensor_share_per_shard,
    logsumexp_over_tensor_per_shard,
    map_matrices,
    mean_of_positions_per_shard,
    sum_over_tensor_per_shard,
)
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.per_shard import per_shard

MESHES = ((1, 1), (8, 1), (1, 8), (2, 4))
LAYOUTS = (
    P(None, None, "data", None),
    P(None, "expert", "data", None),
    P(None, None, ("data", "expert"), None),
    P(None, None, "data", "expert"),
    P(),
)
SHAPE = (3, 8, 16, 24)  # layers, experts, rows, columns


def set_mesh(shape):
    return jax.set_mesh(
        jax.make_mesh(
            shape,
            ("data", "expert"),
            axis_types=(AxisType.Explicit,) * 2,
            devices=jax.devices()[: math.prod(shape)],
        )
    )


def whole_matrix_rule(x):
    """Depends on every value of the matrix and on where it stands."""
    return x @ x.T @ x / jnp.sqrt(jnp.sum(jnp.square(x)))


def oracle(x):
    x = np.asarray(x, np.float64)
    return x @ x.swapaxes(-1, -2) @ x / np.sqrt(np.sum(x * x, axis=(-2, -1), keepdims=True))


def values(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def count_operations(compiled, name):
    """Number of operations of a kind in the compiled program."""
    return len(re.findall(rf"= [^=]*\b{name}(?:-start)?\(", compiled.as_text()))


class MapMatricesTest(parameterized.TestCase):
    @parameterized.product(mesh=MESHES, layout=LAYOUTS)
    def test_result_and_layout_do_not_depend_on_the_mesh(self, mesh, layout):
        with set_mesh(mesh):
            x = jax.device_put(values(), layout)
            mapped = jax.jit(lambda x: map_matrices(whole_matrix_rule, x, stack_dims=2))(x)
            self.assertTrue(mapped.sharding.is_equivalent_to(x.sharding, x.ndim))
            np.testing.assert_allclose(mapped, oracle(values()), rtol=1e-4, atol=1e-4)

    def test_no_mesh_is_a_local_loop(self):
        mapped = jax.jit(lambda x: map_matrices(whole_matrix_rule, x, stack_dims=2))(values())
        np.testing.assert_allclose(mapped, oracle(values()), rtol=1e-4, atol=1e-4)

    @parameterized.parameters(1, 2, 5, 7, 13)
    def test_stacks_that_the_mesh_does_not_divide_are_padded(self, count):
        x = values((count, 16, 24))
        for rotation in (0, 3):
            with set_mesh((2, 4)):
                mapped = jax.jit(
                    functools.partial(
                        map_matrices, whole_matrix_rule, stack_dims=1, rotation=rotation
                    )
                )(jax.device_put(x, P(None, ("data", "expert"), None)))
                np.testing.assert_allclose(mapped, oracle(x), rtol=1e-4, atol=1e-4)

    def test_arrays_in_different_layouts_stay_together(self):
        left, right = values((5, 16, 8)), values((5, 16, 24), seed=1)

        def rule(items):
            joined = whole_matrix_rule(jnp.concatenate(items, axis=1))
            return [joined[:, :8], joined[:, 8:]]

        expected = oracle(np.concatenate([left, right], axis=2))
        with set_mesh((2, 4)):
            items = [
                jax.device_put(left, P(None, ("data", "expert"), None)),
                jax.device_put(right, P(None, None, "expert")),
            ]
            mapped = jax.jit(lambda x: map_matrices(rule, x, stack_dims=1))(items)
            self.assertEqual(
                [jax.typeof(x).sharding.spec for x in mapped],
                [P(None, ("data", "expert"), None), P(None, None, "expert")],
            )
        np.testing.assert_allclose(np.concatenate(mapped, axis=2), expected, rtol=1e-4, atol=1e-4)

    @parameterized.parameters(
        (P(None, None, "data", None), 8, 2),
        (P(None, "expert", "data", None), 2, 2),
        (P(None, None, ("data", "expert"), None), 8, 4),
        (P(None, None, "data", "expert"), 8, 4),
    )
    def test_split_matrices_move_by_all_to_all_alone(self, layout, sharers, all_to_alls):
        del sharers
        with set_mesh((2, 4)):
            x = jax.device_put(values(), layout)
            compiled = (
                jax.jit(lambda x: map_matrices(whole_matrix_rule, x, stack_dims=2))
                .lower(x)
                .compile()
            )
        self.assertEqual(count_operations(compiled, "all-to-all"), all_to_alls)
        is_replicated_over_expert = layout == P(None, None, "data", None)
        self.assertEqual(count_operations(compiled, "all-gather"), int(is_replicated_over_expert))

    @parameterized.product(mesh=MESHES, layout=LAYOUTS)
    def test_each_matrix_is_computed_once_in_the_whole_mesh(self, mesh, layout):
        self.check_computed_once(mesh, layout, SHAPE)

    @parameterized.parameters((8, 1), (1, 8), (2, 4))
    def test_padding_is_not_computed(self, *mesh):
        # 12 matrices on 8 devices: six of them own two, two own padding alone.
        self.check_computed_once(mesh, P(None, None, "data", "expert"), (3, 4, 16, 24))

    def check_computed_once(self, mesh, layout, shape):
        computed = []

        def rule(x):
            jax.debug.callback(lambda mark: computed.append(float(mark)), x[0, 0])
            return x * 2.0

        marks = np.arange(1, 1 + math.prod(shape[:2]), dtype=np.float32)
        x = np.broadcast_to(marks.reshape(*shape[:2], 1, 1), shape)
        with set_mesh(mesh):
            split = jax.device_put(x, layout)
            jax.block_until_ready(jax.jit(lambda x: map_matrices(rule, x, stack_dims=2))(split))
        jax.effects_barrier()
        self.assertCountEqual(computed, marks.tolist())

    def test_replicas_share_the_work_and_exchange_results_in_the_matrices_format(self):
        axes = (AxisType.Explicit,) * 3
        mesh = jax.make_mesh((2, 2, 2), ("replica", "data", "expert"), axis_types=axes)
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.bfloat16(values()), P(None, "expert", "data", None))
            program = jax.jit(lambda x: map_matrices(whole_matrix_rule, x, stack_dims=2))
            lowered = program.lower(x)
            mapped = program(x)
        # 12 matrices on each part of the expert axis: 3 on each device, of which the other
        # replica's are gathered; still split over data, so that 6 x 16 x 24 arrive, not more.
        gathers = re.findall(r"all_gather.*-> tensor<(\S+)>", lowered.as_text())
        self.assertEqual(gathers, ["6x16x24xbf16"])
        np.testing.assert_allclose(np.float32(mapped), oracle(values()), rtol=0.1, atol=1.0)

    def test_axes_may_nest_in_another_order_than_the_meshs(self):
        axes = (AxisType.Explicit,) * 3
        mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=axes)

        def number_rows(x):
            return x * jnp.arange(1.0, 1 + x.shape[0])[:, None]

        with jax.set_mesh(mesh):
            x = jax.device_put(values(), P(None, None, ("tensor", "context"), "data"))
            mapped = jax.jit(lambda x: map_matrices(number_rows, x, stack_dims=2))(x)
            self.assertTrue(mapped.sharding.is_equivalent_to(x.sharding, x.ndim))
        np.testing.assert_array_equal(mapped, values() * np.float32(np.arange(1, 17))[:, None])


class OverAxesPerShardTest(absltest.TestCase):
    def test_a_vocabulary_in_shares_has_the_sums_of_the_whole(self):
        z = values((8, 16))

        def body(z):
            first = first_of_tensor_share_per_shard(z.shape[1])
            taken = jnp.where(first + jnp.arange(z.shape[1]) == 5, z, 0.0)
            of_label = sum_over_tensor_per_shard(jnp.sum(taken, axis=1))
            return logsumexp_over_tensor_per_shard(jax.nn.logsumexp(z, axis=1)), of_label

        def compute(z):
            return per_shard(body, in_specs=P(None, "tensor"), out_specs=P())(z)

        def total(z):
            return jnp.sum(compute(z)[0])

        with jax.set_mesh(make_mesh(ParallelConfig(data=1, expert=1, tensor=4), 1)):
            split = jax.device_put(z, P(None, "tensor"))
            log_sum, of_label = jax.jit(compute)(split)
            gradient = jax.jit(jax.grad(total))(split)
        wide = np.exp(np.float64(z))
        np.testing.assert_allclose(log_sum, np.log(wide.sum(axis=1)), rtol=1e-6)
        np.testing.assert_allclose(of_label, z[:, 5], rtol=1e-6)
        shares = wide / wide.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(gradient, shares, rtol=1e-5, atol=1e-7)

    def test_a_mean_over_positions_takes_those_of_other_devices(self):
        x = values((4, 8, 3))
        layout = P(None, "context", None)
        with jax.set_mesh(make_mesh(ParallelConfig(data=1, expert=1, context=4), 1)):
            mean = per_shard(mean_of_positions_per_shard, in_specs=layout, out_specs=P())
            actual = jax.jit(mean)(jax.device_put(x, layout))
        np.testing.assert_allclose(actual, x.mean(axis=1), rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    absltest.main()
