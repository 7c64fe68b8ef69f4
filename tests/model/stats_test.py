import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.model import stats
from kimi_jax.model.stats import BlockStats, ModelStats


class StatsTest(absltest.TestCase):
    def test_maxima_are_taken_over_sequences_and_never_over_layers(self):
        dense = BlockStats(
            jnp.float32([[[1, -5], [2, -7]]]), None, None, None
        )  # 1 layer, 2 rows, 2 heads
        experts = BlockStats(
            max_logit=jnp.float32([[[9, -2], [3, -1]], [[0, 0], [4, 8]]]),
            expert_load=jnp.float32([[[1, 2], [3, 4]], [[0, 1], [1, 0]]]),
            dropped=jnp.float32([[0, 1], [2, 0]]),
            balance_loss=jnp.float32([[1, 2], [3, 4]]),
        )
        reduced = stats.reduce_blocks([dense, experts])
        np.testing.assert_array_equal(reduced.max_logit, [[2, -5], [9, -1], [4, 8]])
        np.testing.assert_array_equal(reduced.expert_load, [[4, 6], [1, 1]])
        self.assertEqual(reduced.dropped, 3)
        self.assertEqual(reduced.balance_loss, 10)

    def test_micro_batches_merge_by_each_fields_reduction(self):
        # The faulty rule adds maxima: four micro-batches at 60 would pass a threshold of 100.
        part = ModelStats(
            jnp.full((1, 1), 60.0), jnp.ones((1, 2)), jnp.float32(3), jnp.float32(0.5)
        )
        total = part
        for _ in range(3):
            total = stats.merge(total, part)
        self.assertEqual(total.max_logit, 60.0)
        np.testing.assert_array_equal(total.expert_load, [[4, 4]])
        self.assertEqual(total.dropped, 12)
        self.assertEqual(total.balance_loss, 2.0)

    def test_a_model_without_experts_has_no_expert_statistics(self):
        dense = BlockStats(jnp.zeros((1, 2, 2)), None, None, None)
        reduced = stats.reduce_blocks([dense])
        self.assertIsNone(reduced.expert_load)
        self.assertIsNone(stats.merge(reduced, reduced).expert_load)


if __name__ == "__main__":
    absltest.main()
