import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.kernels.fp8 import TILE, dequantize_tiles, quantize_tiles

WIDTHS = (128, 384, 1, 100, 129, 300)
E4M3 = ml_dtypes.float8_e4m3fn


@jax.jit
def round_trip(x):
    return dequantize_tiles(*quantize_tiles(x), x.dtype)


def oracle(x):
    """Codes as float32 and scales, tile by tile in numpy; ml_dtypes rounds."""
    starts = range(0, x.shape[-1], TILE)
    tiles = [x[..., start : start + TILE] for start in starts]
    scales = [np.abs(tile).max(axis=-1, keepdims=True) / np.float32(448) for tile in tiles]
    codes = [(tile / scale).astype(E4M3) for tile, scale in zip(tiles, scales, strict=True)]
    return np.concatenate(codes, -1).astype(np.float32), np.concatenate(
        [scale.ravel() for scale in scales]
    )


def values(width, rows=(3, 2)):
    """Normal values whose magnitude differs from tile to tile by powers of ten."""
    random = np.random.default_rng(width)
    magnitudes = 10.0 ** random.integers(-6, 6, (*rows, width // TILE + 1))
    magnitudes = np.repeat(magnitudes, TILE, axis=-1)[..., :width]
    return (random.standard_normal((*rows, width)) * magnitudes).astype(np.float32)


class Fp8Test(parameterized.TestCase):
    @parameterized.parameters(*WIDTHS)
    def test_codes_and_scales_equal_those_of_numpy(self, width):
        x = values(width)
        codes, scales = jax.jit(quantize_tiles)(x)
        expected_codes, expected_scales = oracle(x)
        self.assertEqual(codes.dtype, E4M3)
        self.assertEqual(scales.shape, (-(-width // TILE) * 3 * 2,))
        np.testing.assert_allclose(scales, expected_scales, rtol=2**-23)
        # A scale that is off by its last bit moves a quotient from one side of a tie to the other.
        moved = np.mean(np.asarray(codes, np.float32) != expected_codes)
        self.assertLessEqual(moved, 1e-3)

    @parameterized.parameters(*WIDTHS)
    def test_error_is_bounded_by_the_digits_of_a_code(self, width):
        x = values(width)
        _, scales = quantize_tiles(jnp.asarray(x))
        scales = np.repeat(scales.reshape(-1, 6).T, TILE, axis=1)[:, :width].reshape(x.shape)
        error = np.abs(np.asarray(round_trip(x), np.float64) - x)
        bound = np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * scales) * (1 + 1e-6)
        np.testing.assert_array_less(error, bound)
        self.assertGreater(error.max(), 0)
        self.assertTrue(np.all(error <= 2.0**-4 * 448 * scales))  # of the tile's largest

    @parameterized.parameters(jnp.float32, jnp.bfloat16)
    def test_values_of_the_grid_come_back_bit_by_bit(self, dtype):
        grid = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
        grid = np.sort(grid[np.isfinite(grid)])
        tiles = np.stack([grid[:128], grid[-128:]])  # both ends are +-448
        for scale in (1.0, 2.0**-20, 2.0**9):
            x = jnp.asarray(tiles * scale, dtype)
            np.testing.assert_array_equal(round_trip(x), x)

    def test_a_second_round_trip_changes_nothing(self):
        once = round_trip(values(300))
        np.testing.assert_allclose(round_trip(once), once, rtol=2**-22)

    def test_zeros_come_back_beside_other_tiles(self):
        x = np.zeros((2, 200), np.float32)
        x[0, 130] = -3.5
        codes, scales = quantize_tiles(jnp.asarray(x))
        np.testing.assert_array_equal(round_trip(x), x)
        np.testing.assert_array_equal(scales.reshape(2, 2)[:, 1], [1.0, 1.0])
        self.assertEqual(float(codes[0, 130]), -448.0)

    def test_tiles_too_small_for_a_scale_become_zeros(self):
        x = np.full((1, 128), 1e-37, np.float32)
        np.testing.assert_array_equal(round_trip(x), np.zeros_like(x))

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_a_value_that_is_not_finite_is_not_hidden(self, value):
        x = np.ones((1, 256), np.float32)
        x[0, 5] = value
        back = round_trip(x)
        self.assertTrue(np.all(np.isnan(back[0, :128])))
        np.testing.assert_array_equal(back[0, 128:], x[0, 128:])


if __name__ == "__main__":
    absltest.main()
