import functools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, PartitionSpec

from kimi_jax.analysis.compiled_program import read_program
from kimi_jax.analysis.scopes import BACKWARD, FORWARD, RECOMPUTED, Scope

_ONE = {"data": 1}
_MESH = {"data": 2, "expert": 4}
_PRODUCT = 2 * 8 * 16 * 16  # of [8, 16] and [16, 16]
_X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
_W = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def _text(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile().as_text()


def _repeat(step, x, times):
    return jax.lax.scan(lambda carry, _: (step(carry), None), x, None, length=times)[0]


def _per_shard(fn):
    automatic = (AxisType.Auto,) * len(_MESH)
    mesh = jax.make_mesh(tuple(_MESH.values()), tuple(_MESH), automatic, devices=jax.devices())
    split = PartitionSpec(tuple(_MESH))
    return jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)


def _gather(x):
    return jax.lax.all_gather(x, "expert").sum(axis=0)


def _sum(x):
    return jax.lax.psum(x, "data")


def _scatter(x):
    return jnp.tile(jax.lax.psum_scatter(x, "expert", tiled=True), (4, 1))


def _exchange(x):
    return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)


def _exchange_all(x):
    return jax.lax.all_to_all(x, ("data", "expert"), split_axis=0, concat_axis=0, tiled=True)


def _permute(x):
    return jax.lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)])


class LoopsTest(absltest.TestCase):
    def test_a_loop_body_counts_as_often_as_it_runs(self):
        def loop(x, w):
            return _repeat(lambda y: jnp.tanh(y @ w), x, 7)

        self.assertEqual(read_program(_text(loop, _X, _W), _ONE).total.flops, 7 * _PRODUCT)

    def test_nested_loops_multiply(self):
        def loops(x, w):
            return _repeat(lambda y: _repeat(lambda z: jnp.tanh(z @ w), y, 3), x, 5)

        self.assertEqual(read_program(_text(loops, _X, _W), _ONE).total.flops, 15 * _PRODUCT)

    def test_an_inner_loop_as_long_as_the_outer_counter_is_counted_trip_by_trip(self):
        def triangle(x, w):
            def row(number, y):
                return jax.lax.fori_loop(0, number, lambda _, z: jnp.tanh(z @ w), y)

            return jax.lax.fori_loop(0, 6, row, x)

        report = read_program(_text(triangle, _X, _W), _ONE)
        self.assertEqual(report.total.flops, (0 + 1 + 2 + 3 + 4 + 5) * _PRODUCT)
        self.assertEmpty(report.unknown_loops)

    def test_a_loop_whose_length_is_data_is_reported(self):
        def loop(x, w, times):
            with jax.named_scope("until_done"):
                return jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ w), x)

        report = read_program(_text(loop, _X, _W, jax.ShapeDtypeStruct((), jnp.int32)), _ONE)
        self.assertEqual(report.total.flops, _PRODUCT)
        self.assertLen(report.unknown_loops, 1)
        self.assertIn("until_done", report.unknown_loops[0])

    def test_a_bound_that_depends_on_the_device_is_known(self):
        def own_share(x):
            trips = 2 + jax.lax.axis_index("expert")
            return jax.lax.fori_loop(0, trips, lambda _, y: jnp.tanh(y @ y.T @ y), x)

        text = _text(_per_shard(own_share), jax.ShapeDtypeStruct((64, 16), jnp.float32))
        for device in (0, 3, 5):
            report = read_program(text, _MESH, device=device)
            with self.subTest(device):
                self.assertEqual(report.total.flops, (2 + device % 4) * 2 * 2 * 8 * 8 * 16)


class WorkTest(absltest.TestCase):
    def test_the_larger_branch_of_a_conditional_counts(self):
        def either(which, x, w):
            return jax.lax.cond(which, lambda: x @ w, lambda: x @ w @ w + x @ (w @ w))

        text = _text(either, jax.ShapeDtypeStruct((), bool), _X, _W)
        self.assertEqual(read_program(text, _ONE).total.flops, 3 * _PRODUCT + 2 * 16 * 16 * 16)

    def test_batched_products_count_every_matrix(self):
        x = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32)
        w = jax.ShapeDtypeStruct((5, 16, 4), jnp.float32)
        text = _text(functools.partial(jnp.einsum, "bij,bjk->bik"), x, w)
        self.assertEqual(read_program(text, _ONE).total.flops, 2 * 5 * 8 * 16 * 4)

    def test_a_loop_over_a_stack_reads_each_part_once(self):
        stack = jax.ShapeDtypeStruct((50, 128, 128), jnp.float32)

        def total(stack):
            return jax.lax.scan(lambda c, w: (c + w, None), jnp.zeros((128, 128)), stack)[0]

        layer = 128 * 128 * 4
        moved = read_program(_text(total, stack), _ONE).total.bytes
        # Each iteration reads a layer and the sum and writes the sum; some make a copy on the way.
        self.assertBetween(moved, 3 * 50 * layer, 7 * 50 * layer)

    def test_scopes_tell_forward_from_backward_and_from_recomputed(self):
        @jax.checkpoint
        def layer(x, w):
            with jax.named_scope("layer"):
                return jnp.sin(jnp.sin(x @ w) @ w), None

        def loss(stack, x):
            return jnp.sum(jax.lax.scan(layer, x, stack)[0])

        stack = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
        report = read_program(_text(jax.value_and_grad(loss), stack, _X), _ONE)
        flops = {scope: work.flops for scope, work in report.scopes.items() if work.flops}
        self.assertEqual(
            flops,
            {
                Scope("layer", FORWARD): 3 * 2 * _PRODUCT,
                Scope("layer", RECOMPUTED): 3 * 2 * _PRODUCT,
                Scope("layer", BACKWARD): 3 * 4 * _PRODUCT,
            },
        )


class CollectivesTest(parameterized.TestCase):
    # A shard is [8, 16] float32, 512 bytes; groups have 4, 2 or 8 devices.
    @parameterized.parameters(
        (_gather, "all-gather", ("expert",), 3 * 512),
        (_sum, "all-reduce", ("data",), 2 * 512 // 2),
        (_scatter, "reduce-scatter", ("expert",), 512 * 3 // 4),
        (_exchange, "all-to-all", ("expert",), 512 * 3 // 4),
        (_exchange_all, "all-to-all", ("data", "expert"), 512 * 7 // 8),
        (_permute, "collective-permute", ("expert",), 512),
    )
    def test_kind_axes_and_bytes(self, fn, kind, axes, size):
        text = _text(_per_shard(fn), jax.ShapeDtypeStruct((64, 16), jnp.float32))
        (found,) = read_program(text, _MESH).collectives
        self.assertEqual((found.kind, found.axes), (kind, axes))
        self.assertEqual((found.count, found.bytes), (1, size))

    def test_a_collective_in_a_loop_counts_every_time(self):
        def sums(x):
            return _repeat(lambda y: jnp.tanh(jax.lax.psum(y, "data")), x, 9)

        text = _text(_per_shard(sums), jax.ShapeDtypeStruct((64, 16), jnp.float32))
        (found,) = read_program(text, _MESH).collectives
        self.assertEqual((found.count, found.bytes), (9, 9 * 512))


if __name__ == "__main__":
    absltest.main()
