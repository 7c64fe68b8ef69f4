import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs.optimizer import NewtonSchulzDtype, NewtonSchulzPreset
from kimi_jax.optimizers.newton_schulz import coefficients, newton_schulz

JORDAN, YOU, POLAR = (
    NewtonSchulzPreset.JORDAN,
    NewtonSchulzPreset.YOU,
    NewtonSchulzPreset.POLAR_EXPRESS,
)
FLOAT32, BFLOAT16 = NewtonSchulzDtype.FLOAT32, NewtonSchulzDtype.BFLOAT16

# Five steps of float32 products of up to 48 terms against float64.
FLOAT32_ATOL = 2e-5
# bfloat16 has 8 bits; the iteration multiplies errors of small singular values by up to 3.4 a step.
BFLOAT16_RELATIVE_ERROR = 0.03


def oracle(x, rows):
    """The iteration in float64, matrix by matrix, without the transposition."""
    x = np.asarray(x, np.float64)
    x = x / (np.linalg.norm(x) + 1e-7)
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def singular_value_map(values, rows):
    for a, b, c in rows:
        values = a * values + b * values**3 + c * values**5
    return values


def run(x, *, steps=5, preset=JORDAN, dtype=FLOAT32):
    return newton_schulz(jnp.asarray(x, jnp.float32), steps=steps, preset=preset, dtype=dtype)


class NewtonSchulzTest(parameterized.TestCase):
    @parameterized.product(preset=list(NewtonSchulzPreset), shape=[(16, 48), (48, 16), (24, 24)])
    def test_equals_the_float64_iteration(self, preset, shape):
        x = np.random.default_rng(0).standard_normal((2, 3, *shape))
        expected = [[oracle(m, coefficients(preset, 5)) for m in row] for row in x]
        np.testing.assert_allclose(run(x, preset=preset), expected, atol=FLOAT32_ATOL)

    def test_bfloat16_products_stay_close(self):
        x = np.random.default_rng(1).standard_normal((32, 64))
        expected = oracle(x, coefficients(JORDAN, 5))
        error = np.linalg.norm(run(x, dtype=BFLOAT16) - expected) / np.linalg.norm(expected)
        self.assertBetween(error, 1e-5, BFLOAT16_RELATIVE_ERROR)

    # Least singular value and rms distance from 1 after k steps, for singular values in [1e-3, 1]
    # of the normalised matrix: the exact scalar map of each preset.
    @parameterized.parameters(
        (JORDAN, 5, 0.47, 0.211),
        (YOU, 5, 0.475, 0.123),
        (POLAR, 5, 0.847, 0.087),
        (JORDAN, 6, 0.68, 0.200),
        (YOU, 6, 0.978, 0.040),
        (POLAR, 6, 0.995, 0.001),
    )
    def test_coefficients_have_the_known_quality(self, preset, steps, least, rms):
        values = np.logspace(-4, 0, 2000)
        mapped = singular_value_map(values, coefficients(preset, steps))[values >= 1e-3]
        self.assertAlmostEqual(mapped.min(), least, delta=0.006)
        self.assertAlmostEqual(np.sqrt(np.mean((1 - mapped) ** 2)), rms, delta=0.0015)

    @parameterized.parameters((JORDAN, 5, 0.6, 1.25), (YOU, 6, 0.9, 1.1), (POLAR, 8, 0.99, 1.01))
    def test_singular_values_come_near_one(self, preset, steps, low, high):
        x = np.random.default_rng(2).standard_normal((32, 80))
        values = np.linalg.svd(run(x, steps=steps, preset=preset), compute_uv=False)
        self.assertGreater(values.min(), low)
        self.assertLess(values.max(), high)

    def test_converged_iteration_gives_the_polar_factor(self):
        x = np.random.default_rng(3).standard_normal((24, 40))
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        np.testing.assert_allclose(run(x, steps=8, preset=POLAR), u @ vt, atol=1e-3)

    @parameterized.parameters(JORDAN, YOU, POLAR)
    def test_zero_matrix_stays_zero(self, preset):
        np.testing.assert_array_equal(run(np.zeros((4, 6)), preset=preset), np.zeros((4, 6)))

    def test_scale_of_the_input_does_not_matter(self):
        x = np.random.default_rng(4).standard_normal((8, 12))
        np.testing.assert_allclose(run(1e3 * x), run(x), atol=FLOAT32_ATOL)

    def test_default_preset_has_the_published_coefficients(self):
        self.assertEqual(coefficients(JORDAN, 5), ((3.4445, -4.7750, 2.0315),) * 5)

    def test_steps_beyond_the_table_repeat_the_last_row(self):
        rows = coefficients(POLAR, 10)
        self.assertLen(rows, 10)
        self.assertEqual(rows[-1], rows[7])
        self.assertEqual(rows[-1], (1.875, -1.25, 0.375))

    def test_result_has_the_dtype_of_the_input(self):
        x = jnp.ones((4, 6), jnp.bfloat16)
        out = newton_schulz(x, steps=1, preset=JORDAN, dtype=BFLOAT16)
        self.assertEqual(out.dtype, jnp.bfloat16)


if __name__ == "__main__":
    absltest.main()
