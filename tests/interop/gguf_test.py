import dataclasses
import pathlib
import sys
import tempfile
from unittest import mock

import gguf
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face_export import FileFormat, to_hugging_face, with_quantization
from kimi_jax.configs.model import YarnConfig
from kimi_jax.core.errors import CheckpointFileError, ConfigError
from kimi_jax.interop import gguf_encode
from kimi_jax.interop.ahead import AHEAD, THREADS
from kimi_jax.interop.gguf import plan_gguf, verify_gguf, write_gguf
from kimi_jax.interop.gguf_encode import GgufType, int4_blocks
from kimi_jax.interop.hf_checkpoint import HfCheckpoint
from kimi_jax.interop.hf_encode import Encoder
from kimi_jax.interop.hf_export import export_hugging_face
from kimi_jax.interop.tensor_source import PackedRows
from tests.interop.gguf_layout_test import gguf_name
from tests.support import published

CONFIG = dataclasses.replace(
    presets.tiny(vocab_size=96),
    num_layers=2,
    embed_dim=64,
    num_routed_experts=6,
    num_heads=3,
    head_value_dim=64,
    routed_scaling_factor=1.5,
)
EXPERT = "model.layers.1.mlp.experts.4.down_proj.weight"
_METADATA = {
    "general.architecture": "deepseek2",
    "general.type": "model",
    "general.name": "tiny-model",
    "general.file_type": 0,
    "general.quantization_version": 2,
    "deepseek2.vocab_size": 96,
    "deepseek2.context_length": 1024,
    "deepseek2.embedding_length": 64,
    "deepseek2.block_count": 2,
    "deepseek2.leading_dense_block_count": 1,
    "deepseek2.feed_forward_length": 320,
    "deepseek2.expert_feed_forward_length": 64,
    "deepseek2.expert_count": 6,
    "deepseek2.expert_used_count": 3,
    "deepseek2.expert_shared_count": 1,
    "deepseek2.expert_group_count": 3,
    "deepseek2.expert_group_used_count": 2,
    "deepseek2.expert_gating_func": 2,
    "deepseek2.expert_weights_norm": True,
    "deepseek2.expert_weights_scale": 1.5,
    "deepseek2.attention.head_count": 3,
    "deepseek2.attention.head_count_kv": 1,
    "deepseek2.attention.q_lora_rank": 64,
    "deepseek2.attention.kv_lora_rank": 32,
    "deepseek2.attention.key_length": 48,
    "deepseek2.attention.value_length": 32,
    "deepseek2.attention.key_length_mla": 48,
    "deepseek2.attention.value_length_mla": 64,
    "deepseek2.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "deepseek2.rope.dimension_count": 16,
    "deepseek2.rope.freq_base": 50_000.0,
    "deepseek2.rope.scaling.type": "yarn",
    "deepseek2.rope.scaling.factor": 8.0,
    "deepseek2.rope.scaling.original_context_length": 64,
    "deepseek2.rope.scaling.yarn_beta_fast": 1.0,
    "deepseek2.rope.scaling.yarn_beta_slow": 1.0,
    "deepseek2.rope.scaling.yarn_log_multiplier": float(np.float32(0.1)),
    "tokenizer.ggml.model": "no_vocab",
}


def expected_tensors(source):
    """The published values under the file's names, put together by NumPy."""
    config, found = source.config, {}
    for name, values in source.tensors.items():
        values = values.astype(np.float32)
        if name.endswith("kv_b_proj.weight"):
            layer, width = name.split(".")[2], config.head_nope_dim + config.head_value_dim
            by_head = values.reshape(config.num_heads, width, config.kv_latent_dim)
            keys, rest = np.split(by_head, [config.head_nope_dim], axis=1)
            found[f"blk.{layer}.attn_k_b.weight"] = keys.transpose(0, 2, 1)
            found[f"blk.{layer}.attn_v_b.weight"] = rest
        elif ".experts." in name:
            found.setdefault(gguf_name(name, config), []).append(values)
        else:
            found[gguf_name(name, config)] = values
    return {
        name: np.stack(values) if isinstance(values, list) else values
        for name, values in found.items()
    }


def read_tensors(reader):
    """Name to format and values; the reader lists shapes the other way round."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
                [int(size) for size in reversed(tensor.shape)]
            ),
        )
        for tensor in reader.tensors
    }


class GgufTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = self.folder / "tiny-model.gguf"

    def write(self, source, weight_type=GgufType.F32, **options):
        write_gguf(self.file, source, None, weight_type=weight_type, identity="random", **options)
        return gguf.GGUFReader(self.file)

    @parameterized.parameters(
        (GgufType.F32, np.float32), (GgufType.F16, np.float16), (GgufType.BF16, ml_dtypes.bfloat16)
    )
    def test_floating_formats_hold_the_published_values(self, weight_type, dtype):
        source = published.RandomSource(CONFIG)
        found = read_tensors(self.write(source, weight_type))
        expected = expected_tensors(source)
        self.assertCountEqual(found, expected)
        for name, values in expected.items():
            stored, got = found[name]
            small = values.ndim == 1 or "ffn_gate_inp." in name
            self.assertEqual(stored, "F32" if small else weight_type.name, name)
            rounded = values if small else values.astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(got, rounded, name)

    def test_float32_sources_are_rounded_to_the_nearest_bfloat16(self):
        source = published.RandomSource(CONFIG)
        exact = source.tensors["lm_head.weight"].astype(np.float32) * np.float32(1.0019)
        source.tensors["lm_head.weight"] = exact
        _, got = read_tensors(self.write(source, GgufType.BF16))["output.weight"]
        np.testing.assert_array_less(np.abs(got - exact), np.abs(exact) * 2.0**-8 + 1e-9)
        self.assertGreater(np.abs(got - exact).max(), 0)

    def test_q8_0_keeps_every_weight_to_half_a_step_and_falls_back_to_float16(self):
        source = published.RandomSource(dataclasses.replace(CONFIG, q_latent_dim=24))
        found = read_tensors(self.write(source, GgufType.Q8_0))
        for name, values in expected_tensors(source).items():
            stored, got = found[name]
            if values.ndim == 1 or "ffn_gate_inp." in name:
                self.assertEqual(stored, "F32", name)
            elif values.shape[-1] % 32:
                self.assertIn("attn_q_b", name)
                self.assertEqual(stored, "F16", name)
            else:
                self.assertEqual(stored, "Q8_0", name)
                groups = values.reshape(-1, 32)
                # Half a step, and what rounding the step to float16 moves the largest code by.
                step = np.abs(groups).max(axis=1, keepdims=True) / 127
                off = np.abs(got.reshape(-1, 32) - groups)
                self.assertTrue((off <= step * (0.5 + 127 * 2.0**-11) + 1e-7).all(), name)

    def test_q4_0_holds_codes_and_scales_of_the_experts_bit_for_bit(self):
        source = published.RandomSource(CONFIG, int4=True)
        reader = self.write(source, GgufType.Q4_0)
        for tensor in reader.tensors:
            if "_exps." not in tensor.name:
                self.assertIn(tensor.tensor_type.name, ("F32", "BF16"), tensor.name)
                continue
            self.assertEqual(tensor.tensor_type.name, "Q4_0")
            blocks = np.asarray(tensor.data).reshape(CONFIG.num_routed_experts, -1, 18)
            part = tensor.name.split("_")[1]
            for expert, own in enumerate(blocks):
                name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
                words, scales = source.packed[name]
                np.testing.assert_array_equal(
                    own[:, :2].copy().view(np.float16)[:, 0].astype(np.float32),
                    scales.reshape(-1).astype(np.float32),
                )
                low, high = own[:, 2:] & 15, own[:, 2:] >> 4
                nibbles = (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4)) & 15
                np.testing.assert_array_equal(
                    np.concatenate([low, high], axis=1), nibbles.reshape(-1, 32)
                )
        found = read_tensors(reader)
        for name, values in expected_tensors(source).items():
            np.testing.assert_array_equal(found[name][1], values, name)

    def test_float16_has_every_bfloat16_scale_from_the_smallest_one_up_to_65280(self):
        every = np.arange(1 << 15, dtype=np.uint16).view(ml_dtypes.bfloat16)
        kept = every[(every.astype(np.float32) >= 2.0**-17) & (every.astype(np.float32) <= 65280)]
        self.assertLess(float(kept.min()), 1e-5)
        np.testing.assert_array_equal(
            kept.astype(np.float16).astype(np.float32), kept.astype(np.float32)
        )

    @parameterized.parameters(7e-6, 70_000.0, float("nan"), float("inf"))
    def test_scale_that_float16_lacks_is_refused_by_the_tensors_name(self, scale):
        source = published.RandomSource(CONFIG, int4=True)
        source.packed[EXPERT].scales[3, 1] = scale
        with self.assertRaisesRegex(CheckpointFileError, f"{EXPERT} has the scale"):
            self.write(source, GgufType.Q4_0)
        self.assertFalse(self.file.exists())

    def test_groups_of_another_size_are_refused(self):
        packed = PackedRows(np.zeros((2, 8), np.int32), np.ones((2, 1), ml_dtypes.bfloat16))
        with self.assertRaisesRegex(CheckpointFileError, "groups of 32"):
            int4_blocks(packed, "experts", (2, 64))

    def test_metadata_is_what_llama_cpp_asks_for(self):
        yarn = YarnConfig(factor=8.0, original_max_position=64, beta_fast=1.0)
        config = dataclasses.replace(
            CONFIG, yarn=yarn, num_expert_groups=3, expert_groups_per_token=2, experts_per_token=3
        )
        with self.assertLogs("absl", "WARNING") as logged:
            reader = self.write(published.RandomSource(config))
        self.assertIn("--yarn-beta-fast 1 ", logged.output[0])
        found = {key: field.contents() for key, field in reader.fields.items()}
        self.assertEqual({key: found.get(key) for key in _METADATA}, _METADATA)
        others = {key for key in found.keys() - _METADATA.keys() if not key.startswith("GGUF.")}
        self.assertEqual(others, set())

    def test_groups_that_limit_nothing_are_written_as_one(self):
        config = dataclasses.replace(CONFIG, num_expert_groups=3, expert_groups_per_token=3)
        fields = self.write(published.RandomSource(config)).fields
        self.assertEqual(fields["deepseek2.expert_group_count"].contents(), 1)
        self.assertEqual(fields["deepseek2.expert_group_used_count"].contents(), 1)

    def test_queries_without_a_latent_have_rank_zero(self):
        config = dataclasses.replace(CONFIG, q_latent_dim=None)
        fields = self.write(published.RandomSource(config)).fields
        self.assertEqual(fields["deepseek2.attention.q_lora_rank"].contents(), 0)


class StreamingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.file = self.folder / "model.gguf"

    @parameterized.parameters(GgufType.BF16, GgufType.Q8_0, GgufType.Q4_0)
    def test_blocks_of_rows_give_the_same_file_and_never_hold_more(self, weight_type):
        source = published.RandomSource(CONFIG, int4=weight_type is GgufType.Q4_0)
        whole, parts = self.folder / "whole.gguf", self.folder / "parts" / "whole.gguf"
        parts.parent.mkdir()
        write_gguf(whole, source, None, weight_type=weight_type, identity="random")
        source.most_values = 0
        with (
            mock.patch.object(gguf_encode, "BLOCK_VALUES", 1024),
            mock.patch.object(gguf_encode, "_ROW_MULTIPLE", 2),
        ):
            write_gguf(parts, source, None, weight_type=weight_type, identity="random")
        self.assertLessEqual(source.most_values, (AHEAD + THREADS + 1) * 1024)
        of_a_layer = CONFIG.num_routed_experts * CONFIG.expert_ffn_dim * CONFIG.embed_dim
        self.assertLess(source.most_values, of_a_layer / 3)
        self.assertEqual(whole.read_bytes(), parts.read_bytes())

    @parameterized.parameters((FileFormat.INT4, GgufType.Q4_0), (FileFormat.BF16, GgufType.Q8_0))
    def test_published_folder_gives_the_same_file(self, form, weight_type):
        source = published.RandomSource(CONFIG, int4=form is FileFormat.INT4)
        encoder = Encoder(source, form, 32)
        fields = to_hugging_face(CONFIG, bos_token_id=0, eos_token_id=1)
        fields = with_quantization(fields, form, 32)
        folder = self.folder / "published"
        export_hugging_face(folder, encoder, fields=fields, identity="", carried=[])
        direct, through = self.folder / "a" / "model.gguf", self.folder / "b" / "model.gguf"
        for file in (direct, through):
            file.parent.mkdir()
        write_gguf(direct, source, None, weight_type=weight_type, identity="random")
        with HfCheckpoint(folder) as checkpoint:
            write_gguf(through, checkpoint, None, weight_type=weight_type, identity="random")
        self.assertEqual(direct.read_bytes(), through.read_bytes())

    def test_progress_counts_the_planned_bytes(self):
        counts = []
        source = published.RandomSource(CONFIG)
        write_gguf(
            self.file,
            source,
            None,
            weight_type=GgufType.Q8_0,
            identity="random",
            progress=counts.append,
        )
        planned = plan_gguf(CONFIG, GgufType.Q8_0)
        self.assertEqual(counts, sorted(set(counts)))
        self.assertEqual(counts[-1], sum(entry.num_bytes for entry in planned))
        reader = gguf.GGUFReader(self.file)
        self.assertEqual(
            [(entry.tensor.name, entry.num_bytes) for entry in planned],
            [(tensor.name, tensor.n_bytes) for tensor in reader.tensors],
        )

    def test_int4_release_of_kimi_k2_has_the_size_of_the_published_one(self):
        planned = plan_gguf(presets.kimi_k2_thinking(), GgufType.Q4_0)
        # Its routers, in bfloat16, take 0.33 GB less.
        total = sum(entry.num_bytes for entry in planned) / 1e9
        self.assertAlmostEqual(total - 0.33, 594.2, delta=0.05)

    @parameterized.parameters(GgufType.F32, GgufType.Q8_0)
    def test_a_changed_byte_is_found_by_its_tensors_name(self, weight_type):
        source = published.RandomSource(CONFIG)
        write_gguf(self.file, source, None, weight_type=weight_type, identity="random")
        counts = []
        verify_gguf(self.file, source, weight_type=weight_type, progress=counts.append)
        planned = plan_gguf(CONFIG, weight_type)
        self.assertEqual(counts[-1], sum(entry.num_bytes for entry in planned))
        tensor = gguf.GGUFReader(self.file).tensors[-1]
        with open(self.file, "r+b") as file:
            file.seek(tensor.data_offset + tensor.n_bytes - 1)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        with self.assertRaisesRegex(CheckpointFileError, tensor.name):
            verify_gguf(self.file, source, weight_type=weight_type)


class BadInputTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.source = published.RandomSource(CONFIG)

    def write(self, weight_type):
        write_gguf(
            self.folder / "model.gguf",
            self.source,
            None,
            weight_type=weight_type,
            identity="random",
        )

    def test_q4_0_needs_int4_experts(self):
        with self.assertRaisesRegex(ConfigError, "q4_0 stores the INT4 weights"):
            self.write(GgufType.Q4_0)

    def test_q4_0_needs_experts(self):
        self.source.config = dataclasses.replace(CONFIG, num_dense_layers=2)
        with self.assertRaisesRegex(ConfigError, "this model has none"):
            self.write(GgufType.Q4_0)

    def test_q4_0_needs_every_expert_in_int4(self):
        self.source = published.RandomSource(CONFIG, int4=True)
        del self.source.packed[EXPERT]
        with self.assertRaisesRegex(CheckpointFileError, f"{EXPERT} is not held in INT4"):
            self.write(GgufType.Q4_0)

    def test_tensor_of_another_shape_is_named(self):
        self.source.tensors[EXPERT] = self.source.tensors[EXPERT][:, :-1]
        with self.assertRaisesRegex(CheckpointFileError, EXPERT):
            self.write(GgufType.BF16)

    def test_tensor_with_too_few_rows_is_named(self):
        self.source.tensors[EXPERT] = self.source.tensors[EXPERT][:-1]
        with self.assertRaisesRegex(CheckpointFileError, EXPERT):
            self.write(GgufType.BF16)

    @parameterized.product(weight_type=(GgufType.F16, GgufType.Q8_0), value=(1e20, np.nan, -np.inf))
    def test_value_that_a_format_cannot_hold_is_refused_by_the_tensors_name(
        self, weight_type, value
    ):
        self.source.tensors[EXPERT][3, 4] = value
        with self.assertRaisesRegex(CheckpointFileError, f"{EXPERT} has a value"):
            self.write(weight_type)

    def test_missing_package_names_the_extra(self):
        hidden = mock.patch.dict(sys.modules, {"gguf": None})
        with hidden, self.assertRaisesRegex(ConfigError, r"kimi_jax\[gguf\]"):
            self.write(GgufType.F32)


if __name__ == "__main__":
    absltest.main()
