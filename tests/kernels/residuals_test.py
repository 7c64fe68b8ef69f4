import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.compute import ResidualFormat
from kimi_jax.kernels.residuals import keep, restore


class ResidualsTest(parameterized.TestCase):
    def test_in_the_compute_format_values_come_back_as_they_were(self):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 200)), jnp.bfloat16)
        (kept,) = keep(x, "x", ResidualFormat.COMPUTE)
        self.assertEqual(kept.dtype, jnp.bfloat16)
        back = restore((kept,), jnp.bfloat16, ResidualFormat.COMPUTE)
        np.testing.assert_array_equal(back, x)

    def test_in_fp8_values_come_back_with_four_digits(self):
        x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 200)), jnp.bfloat16)
        kept = keep(x, "x", ResidualFormat.FP8)
        self.assertEqual([part.dtype for part in kept], [jnp.float8_e4m3fn, jnp.float32])
        back = restore(kept, jnp.bfloat16, ResidualFormat.FP8)
        self.assertEqual(back.dtype, jnp.bfloat16)
        error = np.abs(np.float32(back) / np.float32(x) - 1)
        self.assertBetween(error.max(), 2.0**-8, 2.0**-4 + 2.0**-9)

    @parameterized.parameters(*ResidualFormat)
    def test_a_remat_policy_keeps_by_name_whatever_the_format(self, residuals):
        names = [
            equation.params["name"]
            for equation in jax.make_jaxpr(lambda x: keep(x, "rows", residuals))(
                jnp.ones((2, 128))
            ).jaxpr.eqns
            if equation.primitive.name == "name"
        ]
        self.assertEqual(set(names), {"rows"})


if __name__ == "__main__":
    absltest.main()
