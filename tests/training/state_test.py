import jax
import numpy as np
from absl.testing import absltest

from kimi_jax.core.trees import leaf_names
from kimi_jax.model import transformer
from kimi_jax.training.state import abstract_state, initial_state
from kimi_jax.training.step import make_optimizer
from tests.support import tiny


def _both(config, mesh):
    plan = transformer.specs(config.model)
    with jax.set_mesh(mesh):
        transformation = make_optimizer(config, plan)
        state = initial_state(config, plan, transformation)
        return state, abstract_state(config, plan, transformation, mesh)


class StateTest(absltest.TestCase):
    def test_the_abstract_state_has_the_layout_of_the_real_one(self):
        state, like = _both(tiny.experiment(), tiny.mesh(2, 4))

        def same(leaf, description):
            self.assertEqual(leaf.shape, description.shape)
            self.assertEqual(leaf.dtype, description.dtype)
            self.assertTrue(leaf.sharding.is_equivalent_to(description.sharding, leaf.ndim))

        jax.tree.map(same, state, like)
        self.assertEqual(int(state.step), 0)
        self.assertFalse(np.any(state.clipped_ever))

    def test_offloaded_momentum_lies_in_host_memory_and_nothing_else_does(self):
        config = tiny.experiment(optimizer={"offload_state": True})
        state, like = _both(config, tiny.mesh(2, 4))
        for tree in (state, like):
            in_host = {
                name
                for name, leaf in zip(
                    jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True
                )
                if leaf.sharding.memory_kind == "pinned_host"
            }
            moments = {
                name
                for name, leaf in zip(
                    jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True
                )
                if ".momentum." in name
            }
            self.assertNotEmpty(moments)
            self.assertEqual(in_host, moments)

    def test_moments_lie_beside_their_parameters(self):
        _, like = _both(tiny.experiment(), tiny.mesh(2, 4))
        split = {
            (leaf.shape, leaf.sharding.spec)
            for leaf in jax.tree.leaves(like.params)
            if any(leaf.sharding.spec)
        }
        moments = {
            (leaf.shape, leaf.sharding.spec)
            for leaf in jax.tree.leaves(like.optimizer)
            if any(leaf.sharding.spec)
        }
        self.assertNotEmpty(split)
        self.assertEqual(moments, split)


if __name__ == "__main__":
    absltest.main()
