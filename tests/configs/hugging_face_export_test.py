import dataclasses
import json
import pathlib
import unittest

import numpy as np
from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.hugging_face import model_config_from_hugging_face
from kimi_jax.configs.hugging_face_export import (
    FileFormat,
    int4_group_size,
    to_hugging_face,
    with_quantization,
)
from kimi_jax.configs.model import ModelConfig, YarnConfig
from kimi_jax.core.errors import ConfigError

_PUBLISHED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "kimi_k2"
_NEEDS_PUBLISHED = unittest.skipUnless(
    _PUBLISHED.exists(), "the published files are not part of this repository"
)
# What a release says that is not of the model: its own code, and what wrote the file.
_OF_THE_RELEASE = {"auto_map", "transformers_version"}
_PRESETS = {
    "kimi_k2": presets.kimi_k2(),
    "kimi_k2_thinking": presets.kimi_k2_thinking(),
    "moonlight_16b": presets.moonlight_16b(),
    "deepseek_v3": presets.deepseek_v3(),
    "tiny": dataclasses.replace(presets.tiny(vocab_size=1000), routed_scaling_factor=1.5),
}


def _published(name):
    return json.loads((_PUBLISHED / name).read_text())


def _random_config(seed):
    random = np.random.default_rng(seed)
    sizes = [int(size) for size in 1 + random.permutation(500)]
    groups = sizes.pop() % 5 + 1
    yarn = YarnConfig(
        factor=float(random.uniform(1, 64)),
        original_max_position=sizes.pop(),
        beta_fast=float(random.uniform(2, 40)),
        beta_slow=float(random.uniform(0.5, 2)),
        mscale=float(random.uniform(0.5, 2)),
        mscale_all_dim=float(random.uniform(0.5, 2)),
    )
    return ModelConfig(
        vocab_size=sizes.pop(),
        embed_dim=sizes.pop(),
        num_layers=1000 + sizes.pop(),
        num_dense_layers=sizes.pop(),
        num_heads=sizes.pop(),
        q_latent_dim=random.choice([None, sizes.pop()]),
        kv_latent_dim=sizes.pop(),
        head_nope_dim=sizes.pop(),
        head_rope_dim=2 * sizes.pop(),
        head_value_dim=sizes.pop(),
        dense_ffn_dim=sizes.pop(),
        expert_ffn_dim=sizes.pop(),
        num_routed_experts=groups * 600,
        num_shared_experts=sizes.pop(),
        experts_per_token=sizes.pop(),
        num_expert_groups=groups,
        expert_groups_per_token=int(random.integers(1, groups + 1)),
        routed_scaling_factor=float(random.uniform(1, 3)),
        rope_theta=float(random.uniform(1e4, 1e6)),
        yarn=random.choice([None, yarn]),
        max_position=sizes.pop(),
        norm_eps=float(random.uniform(1e-7, 1e-5)),
        init_std=float(random.uniform(1e-3, 1e-1)),
    )


class HuggingFaceExportTest(parameterized.TestCase):
    @parameterized.parameters(*_PRESETS)
    def test_a_preset_comes_back_from_the_text_of_its_file(self, name):
        text = json.dumps(to_hugging_face(_PRESETS[name]))
        self.assertEqual(model_config_from_hugging_face(json.loads(text)), _PRESETS[name])

    @parameterized.parameters(range(20))
    def test_a_random_model_comes_back_from_the_text_of_its_file(self, seed):
        config = _random_config(seed)
        text = json.dumps(to_hugging_face(config))
        self.assertEqual(model_config_from_hugging_face(json.loads(text)), config)

    def test_the_rule_of_the_scaling_factor_must_be_replaced_by_its_number(self):
        with self.assertRaisesRegex(ConfigError, "routed_scaling_factor is None"):
            to_hugging_face(presets.tiny(vocab_size=1000))

    @_NEEDS_PUBLISHED
    def test_every_field_of_the_published_file_is_written_with_its_value(self):
        published = _published("config.json")
        written = to_hugging_face(presets.kimi_k2(), bos_token_id=163584, eos_token_id=163585)
        written = with_quantization(written, FileFormat.FP8)
        # Programs without remote code know the architecture by its older name.
        self.assertEqual(written.pop("model_type"), "deepseek_v3")
        self.assertEqual(published.pop("model_type"), "kimi_k2")
        for name in published.keys() - _OF_THE_RELEASE:
            self.assertEqual(written[name], published[name], name)
        self.assertEqual(written.keys() - published.keys(), {"ep_size", "rope_interleave"})

    @_NEEDS_PUBLISHED
    def test_int4_is_described_as_published(self):
        published = _published("k2_5_config.json")
        plain = with_quantization(published, "bf16")
        self.assertNotIn("quantization_config", plain["text_config"])
        self.assertEqual(with_quantization(plain, "int4"), published)

    def test_token_ids_are_written_only_where_they_are_given(self):
        config = presets.kimi_k2()
        self.assertNotIn("bos_token_id", to_hugging_face(config))
        written = to_hugging_face(config, bos_token_id=0, eos_token_id=7)
        self.assertEqual((written["bos_token_id"], written["eos_token_id"]), (0, 7))

    @parameterized.parameters(*(member.value for member in FileFormat))
    def test_one_format_replaces_another_and_the_model_stays(self, file_format):
        fields = to_hugging_face(presets.kimi_k2())
        direct = with_quantization(fields, file_format)
        for other in FileFormat:
            again = with_quantization(with_quantization(fields, other), file_format)
            self.assertEqual(again, direct)
        self.assertEqual(model_config_from_hugging_face(direct), presets.kimi_k2())
        self.assertEqual("quantization_config" in direct, file_format != "bf16")

    def test_group_size_is_that_of_the_weights(self):
        fields = with_quantization({}, "int4", group_size=64)
        groups = fields["quantization_config"]["config_groups"]
        self.assertEqual(groups["group_0"]["weights"]["group_size"], 64)

    def test_wrapper_with_two_sections_has_both_changed(self):
        old = {"quant_method": "old"}
        for top in ({}, {"quantization_config": old}):
            wrapper = {**top, "text_config": {"hidden_size": 8, "quantization_config": old}}
            written = with_quantization(wrapper, "fp8")
            new = with_quantization({}, "fp8")["quantization_config"]
            self.assertEqual(written["text_config"]["quantization_config"], new)
            self.assertEqual(written.get("quantization_config"), new if top else None)
            self.assertEqual(
                with_quantization(wrapper, "bf16"), {"text_config": {"hidden_size": 8}}
            )

    def test_what_is_given_is_not_changed(self):
        fields = {"text_config": {"quantization_config": {}}}
        with_quantization(fields, "fp8")
        self.assertEqual(fields, {"text_config": {"quantization_config": {}}})

    def test_unknown_format_is_refused_by_name(self):
        with self.assertRaisesRegex(ConfigError, "bf16, fp8, int4, got 'gguf'"):
            with_quantization({}, "gguf")

    def test_the_group_size_of_int4_is_read_where_it_is_written(self):
        fields = to_hugging_face(presets.kimi_k2())
        self.assertIsNone(int4_group_size(fields))
        self.assertIsNone(int4_group_size(with_quantization(fields, FileFormat.FP8)))
        written = with_quantization(fields, FileFormat.INT4, 16)
        self.assertEqual(int4_group_size(written), 16)
        self.assertEqual(int4_group_size({"text_config": written}), 16)


if __name__ == "__main__":
    absltest.main()
