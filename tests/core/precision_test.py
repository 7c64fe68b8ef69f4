import jax
import jax.numpy as jnp
from absl.testing import absltest

from kimi_jax.core.precision import cast_floats


class PrecisionTest(absltest.TestCase):
    def test_floats_are_cast_and_integers_and_keys_are_not(self):
        tree = {"w": jnp.ones(2), "n": jnp.arange(2), "key": jax.random.key(0)}
        cast = cast_floats(tree, jnp.bfloat16)
        self.assertEqual(cast["w"].dtype, jnp.bfloat16)
        self.assertEqual(cast["n"].dtype, jnp.int32)
        self.assertEqual(cast["key"].dtype, tree["key"].dtype)


if __name__ == "__main__":
    absltest.main()
