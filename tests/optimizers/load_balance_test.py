import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from kimi_jax.optimizers.load_balance import balance_selection_bias, max_violation


class LoadBalanceTest(absltest.TestCase):
    def test_equals_the_rule_written_in_numpy(self):
        rng = np.random.default_rng(0)
        bias = rng.standard_normal((3, 8)).astype(np.float32)
        load = rng.integers(0, 20, (3, 8))
        sign = np.sign(load.mean(1, keepdims=True) - load)
        expected = bias + 1e-3 * (sign - sign.mean(1, keepdims=True))
        moved = balance_selection_bias(jnp.asarray(bias), jnp.asarray(load), rate=1e-3)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)

    def test_idle_expert_rises_and_busy_expert_falls(self):
        load = jnp.array([[0, 4, 4, 8]])
        moved = balance_selection_bias(jnp.zeros((1, 4)), load, rate=0.5)
        np.testing.assert_array_equal(moved, [[0.5, 0, 0, -0.5]])

    def test_biases_do_not_drift_together(self):
        load = jnp.array([[0, 0, 0, 40]])
        moved = balance_selection_bias(jnp.zeros((1, 4)), load, rate=1.0)
        np.testing.assert_allclose(jnp.sum(moved), 0.0, atol=1e-6)
        np.testing.assert_array_equal(moved, [[0.5, 0.5, 0.5, -1.5]])

    def test_balanced_load_moves_nothing(self):
        bias = jnp.array([[0.25, -0.25]])
        moved = balance_selection_bias(bias, jnp.array([[3, 3]]), rate=1e-3)
        np.testing.assert_array_equal(moved, bias)

    def test_max_violation_is_zero_when_balanced_and_largest_when_one_gets_all(self):
        load = jnp.array([[5, 5, 5, 5], [20, 0, 0, 0]])
        np.testing.assert_allclose(max_violation(load), [0.0, 3.0])


if __name__ == "__main__":
    absltest.main()
