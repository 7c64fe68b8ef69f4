import dataclasses
import threading

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face_export import FileFormat
from kimi_jax.core.errors import CheckpointFileError
from kimi_jax.interop import hf_encode, int4_rows
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_formats import stored_tensors
from kimi_jax.interop.hf_names import hf_tensors
from kimi_jax.interop.safetensors_header import DTYPES
from tests.support import families

_CONFIG = dataclasses.replace(families.K2, expert_ffn_dim=96)
_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


class _Source:
    """Random float32 values for any tensor; those of one tensor may be replaced."""

    def __init__(self, **replaced):
        self.config, self.group_size, self.replaced = _CONFIG, None, replaced
        self.threads = set()

    def rows(self, name, rows):
        self.threads.add(threading.get_ident())
        if name in self.replaced:
            return self.replaced[name][rows]
        random = np.random.default_rng(list(name.encode()))
        return random.normal(size=hf_tensors(_CONFIG)[name].shape).astype(np.float32)[rows]

    def int4_rows(self, name, rows):
        del name, rows


class EncoderTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # Several blocks of rows for each of the larger tensors.
        self.enterContext(absltest.mock.patch.object(hf_encode, "BLOCK_BYTES", 128 * 4 * 32))

    @parameterized.parameters(*FileFormat)
    def test_what_is_planned_comes_in_this_order_in_blocks_of_rows(self, form):
        source, tensors = _Source(), hf_tensors(_CONFIG).values()
        joined = {}
        for name, array in Encoder(source, form, 32).arrays(tensors):
            joined.setdefault(name, []).append(array)
        planned = [info for tensor in tensors for info in stored_tensors(tensor, form, 32)]
        self.assertEqual(list(joined), [info.name for info in planned])
        for info in planned:
            array = np.concatenate(joined[info.name])
            self.assertEqual((array.shape, array.dtype), (info.shape, DTYPES[info.dtype]))
        blocks = joined["model.layers.0.self_attn.o_proj.weight"]
        self.assertEqual([len(block) for block in blocks], [128, 128])
        self.assertLen(source.threads, hf_encode.THREADS)

    def test_values_are_rounded_to_bfloat16_and_the_selection_bias_is_not(self):
        source = _Source()
        arrays = dict(Encoder(source, FileFormat.BF16, 32).arrays(hf_tensors(_CONFIG).values()))
        for name in (_EXPERT, "model.layers.1.mlp.gate.weight", "model.norm.weight"):
            expected = source.rows(name, slice(None)).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(arrays[name], expected)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        np.testing.assert_array_equal(arrays[name], source.rows(name, slice(None)))

    def test_int4_is_rounded_as_in_training(self):
        source = _Source()
        arrays = dict(Encoder(source, FileFormat.INT4, 16).arrays([hf_tensors(_CONFIG)[_EXPERT]]))
        packed, scales = int4_rows.quantize(source.rows(_EXPERT, slice(None)), 16)
        np.testing.assert_array_equal(arrays[_EXPERT + "_packed"], packed)
        np.testing.assert_array_equal(arrays[_EXPERT + "_scale"], scales)
        np.testing.assert_array_equal(arrays[_EXPERT + "_shape"], [96, 256])

    @parameterized.product(form=[FileFormat.FP8, FileFormat.INT4], value=[np.nan, np.inf])
    def test_what_is_not_finite_cannot_be_quantised_and_is_named(self, form, value):
        values = np.ones((96, 256), np.float32)
        values[70, 3] = value
        encoder = Encoder(_Source(**{_EXPERT: values}), form, 32)
        with self.assertRaisesRegex(CheckpointFileError, f"{_EXPERT} .* not finite, which {form}"):
            list(encoder.arrays(hf_tensors(_CONFIG).values()))

    def test_blocks_of_rows_begin_with_blocks_of_fp8_and_cover_the_tensor(self):
        for tensor in hf_tensors(_CONFIG).values():
            blocks = list(hf_encode.row_blocks(tensor))
            self.assertEqual([b.start % 128 for b in blocks], [0] * len(blocks))
            ends = [0, *(block.stop for block in blocks)]
            self.assertEqual([block.start for block in blocks], ends[:-1])
            self.assertEqual(ends[-1], tensor.shape[0])


class PeakTest(absltest.TestCase):
    def test_a_conversion_of_kimi_k2_needs_less_than_a_gigabyte_beside_its_largest_tensor(self):
        config = dataclasses.replace(presets.kimi_k2(), num_layers=2, num_routed_experts=8)
        largest = 163_840 * 7168 * 2
        peak = hf_encode.peak_bytes(hf_tensors(config).values())
        self.assertBetween(peak, 600 << 20, 2 * largest + (1 << 30))


if __name__ == "__main__":
    absltest.main()
