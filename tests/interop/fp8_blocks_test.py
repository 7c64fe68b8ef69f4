import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.interop import fp8_blocks
from tests.support import families


def _dequantize_by_loops(codes, scales):
    return families.values({"w": codes, "w_scale_inv": scales}, "w")


def _block_of(codes):
    """A block that holds these codes, each many times, in both signs."""
    signs = np.where(np.arange(128 * 128) % 3 == 0, -1, 1).astype(np.float32)
    values = np.resize(np.asarray(codes, np.float32), 128 * 128) * signs
    return values.astype(ml_dtypes.float8_e4m3fn).reshape(128, 128)


class DequantizeTest(parameterized.TestCase):
    def test_each_value_has_the_scale_of_its_own_128_by_128_block(self):
        codes, scales = families.random_fp8((576, 200), np.random.default_rng(0))
        self.assertEqual(scales.shape, (5, 2))  # four blocks and a half, not five of 116 rows
        expected = _dequantize_by_loops(codes, scales)
        np.testing.assert_array_equal(fp8_blocks.dequantize(codes, scales), expected)

    @parameterized.parameters(
        (slice(0, 300), slice(0, 260)),
        (slice(100, 128), slice(128, 129)),
        (slice(127, 257), slice(0, 128)),
        (slice(130, 140), slice(255, 260)),
        (slice(256, 300), slice(3, 200)),
    )
    def test_a_piece_has_the_scales_of_the_blocks_that_it_touches(self, rows, columns):
        codes, scales = families.random_fp8((300, 260), np.random.default_rng(1))
        expected = _dequantize_by_loops(codes, scales)[rows, columns]
        touched = tuple(slice(p.start // 128, (p.stop - 1) // 128 + 1) for p in (rows, columns))
        found = fp8_blocks.dequantize(
            codes[rows, columns],
            scales[touched],
            first_row=rows.start,
            first_column=columns.start,
        )
        np.testing.assert_array_equal(found, expected)


class QuantizeTest(parameterized.TestCase):
    @parameterized.parameters(range(5))
    def test_what_came_from_fp8_returns_exactly_whatever_its_scales_were(self, seed):
        codes, scales = families.random_fp8((300, 260), np.random.default_rng(seed))
        values = _dequantize_by_loops(codes, scales)
        again = _dequantize_by_loops(*fp8_blocks.quantize(values))
        np.testing.assert_array_equal(again, values)

    @parameterized.product(
        codes=[
            (448, 416, 0.001953125),  # the largest and the smallest code
            (240, 1.875),
            (120, 0.5, 104),
            (1.0,),
            (0.013671875, 0.001953125),  # subnormal codes
            (0.001953125,),
            (0.0, 3.5),
        ],
        scale=[1.0, 2.0**-20, 1e-4, 0.7071067, 3.3e12, 1.9999999],
    )
    def test_a_block_of_few_codes_returns_exactly(self, codes, scale):
        block, scales = _block_of(codes), np.full((1, 1), scale, np.float32)
        values = _dequantize_by_loops(block, scales)
        again = _dequantize_by_loops(*fp8_blocks.quantize(values))
        np.testing.assert_array_equal(again, values)

    def test_other_values_are_rounded_to_the_nearest_code_of_the_blocks_largest(self):
        values = np.random.default_rng(0).normal(0, 1, (150, 130)).astype(np.float32)
        codes, scales = fp8_blocks.quantize(values)
        self.assertEqual((codes.dtype, scales.dtype), (ml_dtypes.float8_e4m3fn, np.float32))
        self.assertEqual((codes.shape, scales.shape), (values.shape, (2, 2)))
        for i, j in np.ndindex(2, 2):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = np.abs(values[part]).max() / np.float32(448)
            self.assertEqual(scales[i, j], scale)
            expected = (values[part] / scale).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(codes[part], expected)

    def test_every_code_and_what_lies_between_two_is_rounded_as_by_ml_dtypes(self):
        codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        between = (codes[1:] + codes[:-1]) / 2  # ties
        near = np.concatenate([np.nextafter(between, 0), np.nextafter(between, np.float32(448))])
        values = np.concatenate([codes, between, near])
        values = np.resize(np.concatenate([values, -values]), (128, 128))
        found, scales = fp8_blocks.quantize(values)
        self.assertEqual(scales.item(), 1.0)
        expected = values.astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))

    def test_zeros_stay_zeros_with_the_scale_1(self):
        codes, scales = fp8_blocks.quantize(np.zeros((130, 5), np.float32))
        np.testing.assert_array_equal(codes.astype(np.float32), np.zeros((130, 5)))
        np.testing.assert_array_equal(scales, np.ones((2, 1)))

    def test_rows_that_begin_with_a_block_are_quantised_as_in_the_whole(self):
        values = np.random.default_rng(0).normal(0, 1, (300, 20)).astype(np.float32)
        codes, scales = fp8_blocks.quantize(values)
        for rows, blocks in ((slice(0, 256), slice(0, 2)), (slice(256, 300), slice(2, 3))):
            part = fp8_blocks.quantize(values[rows])
            np.testing.assert_array_equal(part[0], codes[rows])
            np.testing.assert_array_equal(part[1], scales[blocks])


if __name__ == "__main__":
    absltest.main()
