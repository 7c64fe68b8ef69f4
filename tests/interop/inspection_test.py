import math
import types

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.interop import inspection
from kimi_jax.interop.inspection import Difference, Norms
from kimi_jax.interop.safetensors_io import DTYPES, TensorInfo

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAN, _INF = math.nan, math.inf


class _InMemory:
    """Tensors that take note of how many bytes are read at once."""

    def __init__(self, **arrays):
        self._arrays = arrays
        self.most_bytes = 0
        infos = {n: TensorInfo(n, _NAMES[a.dtype], a.shape) for n, a in arrays.items()}
        self.tensors = types.MappingProxyType(infos)

    def read(self, name, rows=None):
        block = self._arrays[name] if rows is None else self._arrays[name][rows]
        self.most_bytes = max(self.most_bytes, block.nbytes)
        return block


def _norms(array):
    source, read = _InMemory(w=array), []
    found = inspection.norms(source, "w", read.append)
    assert sum(read) == array.nbytes
    return found


def _difference(a, b):
    read = []
    found = inspection.difference(_InMemory(w=a), _InMemory(w=b), "w", read.append)
    assert sum(read) == a.nbytes + b.nbytes
    return found


class GroupTest(parameterized.TestCase):
    @parameterized.parameters(
        (["a.0.w", "a.1.w", "a.2.w"], "a.{0..2}.w", 3),
        (["a.7.w"], "a.7.w", 1),
        (["a.10.w", "a.2.w", "a.3.w"], "a.{2..3,10}.w", 3),
        (["a.1.e.0", "a.1.e.1", "a.2.e.0", "a.2.e.1"], "a.{1..2}.e.{0..1}", 4),
        (["a.1.e.0", "a.1.e.1", "a.2.e.1"], "a.{1..2}.e.{0..1}", 4),  # one is missing
        (["w2.bias"], "w2.bias", 1),
    )
    def test_numbers_between_dots_become_ranges(self, names, pattern, expected):
        (group,) = inspection.group(dict.fromkeys(names, "key"))
        self.assertEqual((group.pattern, group.expected), (pattern, expected))
        self.assertEqual((group.key, group.names), ("key", tuple(names)))

    def test_what_has_another_key_or_name_is_another_group(self):
        keys = {"a.0.w": 1, "b": 1, "a.1.w": 2, "a.2.w": 1}
        found = [(group.pattern, group.key) for group in inspection.group(keys)]
        self.assertEqual(found, [("a.{0,2}.w", 1), ("b", 1), ("a.1.w", 2)])


class NormsTest(parameterized.TestCase):
    @parameterized.parameters("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64")
    def test_norms_are_those_of_the_values_in_double_precision(self, dtype):
        rows = 3 * inspection._BLOCK_BYTES // (257 * DTYPES[dtype].itemsize)  # an odd number a row
        values = np.random.default_rng(0).standard_normal((rows, 257), np.float32)
        array = values.astype(DTYPES[dtype])
        exact = array.astype(np.float64)
        found = _norms(array)
        self.assertAlmostEqual(found.rms, np.sqrt(np.mean(exact**2)), places=12)
        self.assertEqual(found.largest, np.abs(exact).max())
        self.assertEqual((found.num_finite, found.num_non_finite), (array.size, 0))

    @parameterized.parameters("F8_E5M2", "F16", "BF16", "F32")
    def test_values_that_are_not_finite_are_counted_and_left_out(self, dtype):
        array = np.array([[1.0, _NAN, -3.0], [_INF, -_INF, 2.0]]).astype(DTYPES[dtype])
        self.assertEqual(_norms(array), Norms(3, 14.0, 3.0, 3))

    def test_an_fp8_nan_is_found(self):
        array = np.array([0x7F, 0xFF, 0x38], np.uint8).view(ml_dtypes.float8_e4m3fn)
        self.assertEqual(_norms(array), Norms(1, 1.0, 1.0, 2))

    def test_a_signalling_nan_is_found_without_a_warning(self):
        array = np.array([0x7F80_0001, 0x3F80_0000], np.uint32).view(np.float32)
        self.assertEqual(_norms(array), Norms(1, 1.0, 1.0, 1))

    def test_scalars_empty_arrays_and_integers_are_told_apart(self):
        self.assertEqual(_norms(np.array(-2.0, np.float32)), Norms(1, 4.0, 2.0, 0))
        self.assertEqual(_norms(np.zeros((0, 3), DTYPES["BF16"])), Norms())
        self.assertEqual(_norms(np.zeros((3, 0), np.float32)).rms, 0.0)
        self.assertIsNone(_norms(np.arange(4, dtype=np.int32)))

    def test_a_large_tensor_is_read_in_blocks(self):
        source = _InMemory(w=np.ones((5000, 1000), DTYPES["BF16"]))
        self.assertEqual(inspection.norms(source, "w", lambda _: None).num_finite, 5_000_000)
        self.assertLessEqual(source.most_bytes, inspection._BLOCK_BYTES)


class DifferenceTest(parameterized.TestCase):
    def test_the_largest_differences_are_found_in_any_block(self):
        a = np.ones((3000, 500), np.float32)
        b = a.copy()
        b[10, 3], b[2999, 499], b[1500, 7] = 1.5, -1.0, 1e-3
        self.assertEqual(_difference(a, b), Difference(3, 2.0, 2.0))
        self.assertEqual(_difference(b, a), Difference(3, 2.0, 2.0))

    def test_the_relative_difference_is_that_to_the_larger_value(self):
        a, b = np.array([4.0, 100.0], np.float32), np.array([3.0, 101.0], np.float32)
        self.assertEqual(_difference(a, b), Difference(2, 1.0, 0.25))

    @parameterized.parameters(
        ([_NAN, 1.0], [_NAN, 1.0], Difference()),
        ([_INF, 1.0], [_INF, 1.0], Difference()),
        ([0.0, 1.0], [-0.0, 1.0], Difference()),
        ([_NAN, 1.0], [0.0, 1.0], Difference(1, _INF, _INF)),
        ([_INF, 1.0], [-_INF, 3.0], Difference(2, _INF, _INF)),
    )
    def test_values_that_are_not_finite_differ_from_others_only(self, a, b, expected):
        # The last column has other bits on each side, so that values must be looked at.
        a, b = (np.array([[*x, zero]], np.float32) for x, zero in ((a, 0.0), (b, -0.0)))
        self.assertEqual(_difference(a, b), expected)

    def test_dtypes_may_differ_where_values_do_not(self):
        a = np.array([[1.0, -0.5]], np.float32)
        self.assertEqual(_difference(a, a.astype(ml_dtypes.float8_e4m3fn)), Difference())
        self.assertEqual(
            _difference(a, a.astype(ml_dtypes.bfloat16) * ml_dtypes.bfloat16(2)),
            Difference(2, 1.0, 0.5),
        )

    def test_codes_are_compared_as_numbers(self):
        a, b = np.array([5, 2**31 - 1], np.int32), np.array([5, -(2**31)], np.int32)
        self.assertEqual(_difference(a, b).absolute, 2.0**32 - 1)


if __name__ == "__main__":
    absltest.main()
