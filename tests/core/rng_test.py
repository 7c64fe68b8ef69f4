import itertools

import jax
import numpy as np
from absl.testing import absltest

from kimi_jax.core.rng import key_for


class RngTest(absltest.TestCase):
    def test_different_names_give_different_keys(self):
        root = jax.random.key(0)
        names = [("a",), ("b",), ("a", 0), ("a", 1), (0, "a"), ("a", "b"), ("b", "a")]
        keys = [jax.random.key_data(key_for(root, *name)).tolist() for name in names]
        for first, second in itertools.combinations(keys, 2):
            self.assertNotEqual(first, second)

    def test_the_same_names_give_the_same_key_traced_or_not(self):
        root = jax.random.key(0)
        traced = jax.jit(lambda step: key_for(root, "rollout", step))(7)
        np.testing.assert_array_equal(
            jax.random.key_data(traced), jax.random.key_data(key_for(root, "rollout", 7))
        )


if __name__ == "__main__":
    absltest.main()
