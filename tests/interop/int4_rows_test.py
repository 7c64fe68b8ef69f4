import pathlib

import ml_dtypes
import numpy as np
from absl.testing import absltest

from kimi_jax.interop import int4_rows
from tests.support import families

_GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "int4" / "compressed_tensors.npz"


class Int4RowsTest(absltest.TestCase):
    def test_words_scales_and_values_are_those_of_the_compressed_tensors_library(self):
        with np.load(_GOLDEN) as golden:
            packed, scales = int4_rows.quantize(golden["weight"])
            np.testing.assert_array_equal(packed, golden["weight_packed"])
            np.testing.assert_array_equal(scales.astype(np.float32), golden["weight_scale"])
            self.assertEqual((packed.dtype, scales.dtype), (np.int32, ml_dtypes.bfloat16))
            values = int4_rows.dequantize(packed, scales)
            self.assertEqual(values.dtype, ml_dtypes.bfloat16)
            np.testing.assert_array_equal(values.astype(np.float32), golden["values"])

    def test_any_codes_and_scales_are_read_as_by_loops(self):
        packed, scales = families.random_int4((5, 96), np.random.default_rng(0))
        found = int4_rows.dequantize(packed, scales).astype(np.float32)
        np.testing.assert_array_equal(found, families.int4_values(packed, scales))

    def test_codes_are_minus_8_to_7_the_first_in_the_lowest_nibble(self):
        words = np.array([[0x76543210, -0x01234568]], np.int32)  # 0xFEDCBA98
        found = int4_rows.dequantize(words, np.ones((1, 1), ml_dtypes.bfloat16))
        np.testing.assert_array_equal(found.astype(np.float32), [np.arange(16) - 8.0])

    def test_words_that_are_not_contiguous_are_read(self):
        packed, scales = families.random_int4((64, 64), np.random.default_rng(0))
        expected = int4_rows.dequantize(packed, scales)
        found = int4_rows.dequantize(packed.T.copy().T, scales)
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))

    def test_what_rounding_gave_is_rounded_to_itself(self):
        packed, scales = families.rounded_int4((40, 64), np.random.default_rng(0))
        again = int4_rows.quantize(int4_rows.dequantize(packed, scales))
        np.testing.assert_array_equal(again[0], packed)
        np.testing.assert_array_equal(again[1], scales)

    def test_groups_that_do_not_divide_the_inputs_raise(self):
        with self.assertRaisesRegex(ValueError, "groups of 32 do not divide 40"):
            int4_rows.quantize(np.ones((2, 40), np.float32))


if __name__ == "__main__":
    absltest.main()
