import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec as P

from kimi_jax.configs import presets
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.model import feed_forward
from kimi_jax.parallel import placement
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.rules import BATCH

_PLAN = feed_forward.specs(presets.tiny(vocab_size=64), 32)


def _mesh(data, expert):
    return make_mesh(ParallelConfig(data=data, expert=expert), 16)


def _initialize(mesh):
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(placement.initialize, plan=_PLAN))(jax.random.key(0))


class PlacementTest(absltest.TestCase):
    def test_initial_values_do_not_depend_on_the_mesh(self):
        one, eight = _initialize(_mesh(1, 1)), _initialize(_mesh(2, 4))
        chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(eight))

    def test_parameters_are_created_in_storage_layout(self):
        params = _initialize(_mesh(2, 4))
        self.assertEqual(jax.typeof(params.w_gate).sharding.spec, P(("data", "expert"), None))
        self.assertEqual(params.w_gate.addressable_shards[0].data.shape, (16, 32))

    def test_leaves_of_equal_shape_differ(self):
        params = _initialize(_mesh(1, 1))
        self.assertFalse(np.array_equal(params.w_gate, params.w_up))

    def test_to_compute_gathers_and_casts_and_its_gradient_scatters(self):
        mesh = _mesh(2, 4)
        params = _initialize(mesh)
        x = jax.device_put(np.ones((8, 4, 128), np.float32), jax.NamedSharding(mesh, BATCH))
        layouts = []

        def loss(stored):
            computed = placement.to_compute(stored, _PLAN, jnp.bfloat16)
            layouts.append((computed.w_up.dtype, jax.typeof(computed.w_up).sharding.spec))
            y = feed_forward.feed_forward(computed, x.astype(jnp.bfloat16))
            return jnp.sum(y.astype(jnp.float32))

        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(loss))
            text = gradient.lower(params).compile().as_text()
            gradients = gradient(params)
        self.assertEqual(layouts[0], (jnp.bfloat16, P(None, None)))
        self.assertEqual(gradients.w_up.dtype, jnp.float32)
        self.assertEqual(gradients.w_up.sharding.spec, P(("data", "expert"), None))
        self.assertIn("all-gather", text)

    def test_on_tpus_mesh_axes_are_gathered_one_after_the_other(self):
        mesh = _mesh(2, 4)
        params = _initialize(mesh)
        compute = functools.partial(placement.to_compute, plan=_PLAN, dtype=jnp.float32)
        with jax.set_mesh(mesh):
            at_once = jax.jit(compute)(params)
            with mock.patch.object(placement, "target_platform", return_value="tpu"):
                traced = jax.jit(lambda tree: compute(tree)).trace(params)
            in_steps = traced.lower().compile()(params)
        chex.assert_trees_all_equal(at_once, in_steps)
        reshards = [e for e in traced.jaxpr.eqns if e.primitive.name == "reshard"]
        layouts = [reshard.params["dst_sharding"].spec for reshard in reshards]
        self.assertEqual(layouts[:2], [P("data", None), P(None, None)])

    def test_abstract_parameters_are_those_of_initialize(self):
        mesh = _mesh(2, 4)
        params, abstract = _initialize(mesh), placement.abstract_parameters(_PLAN, mesh)
        for real, planned in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
            self.assertEqual((real.shape, real.dtype), (planned.shape, planned.dtype))
            self.assertTrue(real.sharding.is_equivalent_to(planned.sharding, real.ndim))


if __name__ == "__main__":
    absltest.main()
