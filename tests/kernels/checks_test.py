import jax.numpy as jnp
from absl.testing import absltest

from kimi_jax.kernels.checks import check_same_dtype, check_shapes


class ChecksTest(absltest.TestCase):
    def test_shapes_that_agree_pass(self):
        check_shapes("op", {"x": (jnp.zeros((2, 3)), "A K"), "w": (jnp.zeros((3, 3)), "K N")})

    def test_a_letter_with_two_sizes_raises_and_names_both_operands(self):
        with self.assertRaisesRegex(ValueError, r"op: w must be \[K N\] with K = 3 as in x"):
            check_shapes("op", {"x": (jnp.zeros((2, 3)), "A K"), "w": (jnp.zeros((4, 3)), "K N")})

    def test_a_wrong_number_of_dimensions_raises(self):
        with self.assertRaisesRegex(ValueError, r"op: x must be \[A K\], got shape \(2,\)"):
            check_shapes("op", {"x": (jnp.zeros(2), "A K")})

    def test_mixed_dtypes_raise(self):
        with self.assertRaisesRegex(ValueError, "'w': 'bfloat16'"):
            check_same_dtype("op", {"x": jnp.zeros(1), "w": jnp.zeros(1, jnp.bfloat16)})


if __name__ == "__main__":
    absltest.main()
