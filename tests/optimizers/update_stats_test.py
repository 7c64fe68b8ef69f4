import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.optimizers.update_stats import role_names, update_rms
from tests.optimizers import toy_plans


class UpdateStatsTest(absltest.TestCase):
    def test_rms_is_over_all_values_of_a_group(self):
        updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[0.0, 5.0]]), "c": jnp.array([2.0])}
        rms = update_rms(updates, {"a": "x", "b": "x", "c": "y"})
        np.testing.assert_allclose(rms["x"], np.sqrt(50 / 4), rtol=1e-6)
        np.testing.assert_allclose(rms["y"], 2.0)

    def test_roles_are_the_last_part_of_names(self):
        roles = role_names(toy_plans.model_plan())
        self.assertEqual(roles["moe_blocks"]["feed_forward"]["experts"]["w_gate"], "w_gate")
        self.assertEqual(roles["dense_blocks"]["attention"]["w_q_rope"], "w_q_rope")
        self.assertLen(set(jax.tree.leaves(roles)), 20)


if __name__ == "__main__":
    absltest.main()
