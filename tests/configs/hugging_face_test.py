import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from kimi_jax.configs.hugging_face import model_config_from_hugging_face
from kimi_jax.configs.model import ModelConfig, YarnConfig
from kimi_jax.core.errors import ConfigError

_YARN = {
    "type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# Every size is another number, so that no two fields can be exchanged unnoticed.
_FIELDS = {
    "model_type": "kimi_k2",
    "vocab_size": 1000,
    "hidden_size": 70,
    "num_hidden_layers": 9,
    "first_k_dense_replace": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 15,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 17,
    "qk_rope_head_dim": 18,
    "v_head_dim": 19,
    "intermediate_size": 184,
    "moe_intermediate_size": 20,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 4,
    "topk_group": 3,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.03,
    "rope_theta": 40000.0,
    "rope_scaling": _YARN,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}
_EXPECTED = ModelConfig(
    vocab_size=1000,
    embed_dim=70,
    num_layers=9,
    num_dense_layers=2,
    num_heads=5,
    q_latent_dim=15,
    kv_latent_dim=16,
    head_nope_dim=17,
    head_rope_dim=18,
    head_value_dim=19,
    dense_ffn_dim=184,
    expert_ffn_dim=20,
    num_routed_experts=24,
    num_shared_experts=1,
    experts_per_token=6,
    num_expert_groups=4,
    expert_groups_per_token=3,
    routed_scaling_factor=2.5,
    max_position=131072,
    norm_eps=1e-5,
    init_std=0.03,
    rope_theta=40000.0,
    yarn=YarnConfig(factor=32.0, original_max_position=4096, beta_fast=1.0, beta_slow=1.0),
)


def _without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def _folder(test):
    return pathlib.Path(test.enter_context(tempfile.TemporaryDirectory()))


class HuggingFaceTest(parameterized.TestCase):
    def test_every_field_arrives_under_its_own_name(self):
        self.assertEqual(model_config_from_hugging_face(_FIELDS), _EXPECTED)

    def test_file_and_mapping_give_the_same(self):
        path = _folder(self) / "config.json"
        path.write_text(json.dumps(_FIELDS))
        self.assertEqual(model_config_from_hugging_face(path), _EXPECTED)
        self.assertEqual(model_config_from_hugging_face(str(path)), _EXPECTED)

    def test_newer_spelling_of_rope_gives_the_same(self):
        rope = {**_without(_YARN, "type"), "rope_type": "yarn", "rope_theta": 40000.0}
        fields = {**_without(_FIELDS, "rope_scaling", "rope_theta"), "rope_parameters": rope}
        self.assertEqual(model_config_from_hugging_face(fields), _EXPECTED)

    @parameterized.parameters(
        ({"rope_scaling": None},),
        ({"rope_scaling": {"type": "default"}},),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 4e4}},),
    )
    def test_no_scaling_means_no_yarn(self, changes):
        config = model_config_from_hugging_face({**_FIELDS, **changes})
        self.assertIsNone(config.yarn)
        self.assertEqual(config.rope_theta, 40000.0)

    def test_multimodal_wrapper_is_read_from_its_text_config(self):
        wrapper = {"model_type": "kimi_k25", "text_config": _FIELDS, "vision_config": {}}
        with self.assertLogs("absl", "WARNING") as log:
            self.assertEqual(model_config_from_hugging_face(wrapper), _EXPECTED)
        self.assertIn("vision", log.output[0])

    def test_null_query_latent_projects_queries_directly(self):
        config = model_config_from_hugging_face({**_FIELDS, "q_lora_rank": None})
        self.assertIsNone(config.q_latent_dim)

    @parameterized.parameters("num_nextn_predict_layers", "num_mtp_layers")
    def test_token_prediction_layers_are_left_out_aloud(self, name):
        with self.assertLogs("absl", "WARNING") as log:
            config = model_config_from_hugging_face({**_FIELDS, name: 1})
        self.assertIn(name, log.output[0])
        self.assertEqual(config.num_layers, 9)

    @parameterized.parameters(
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", 2),
        ("norm_topk_prob", False),
        ("rope_interleave", False),
        ("scoring_func", "softmax"),
        ("tie_word_embeddings", True),
        ("topk_method", "greedy"),
        ("model_type", "deepseek_v2"),
        ("num_key_value_heads", 1),
        ("sliding_window", 512),
        ("routed_scaling_factor", None),
        ("kv_lora_rank", None),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    )
    def test_foreign_mathematics_is_refused_by_name(self, name, value):
        with self.assertRaisesRegex(ConfigError, name):
            model_config_from_hugging_face({**_FIELDS, name: value})

    def test_tied_embeddings_of_the_wrapper_are_refused(self):
        wrapper = {"model_type": "kimi_k25", "text_config": _FIELDS, "tie_word_embeddings": True}
        with self.assertRaisesRegex(ConfigError, "tie_word_embeddings"):
            model_config_from_hugging_face(wrapper)

    @parameterized.parameters(
        ("rope_scaling.type", {"type": "linear", "factor": 2.0}),
        ("factor", {"factor": 2.0}),
        ("truncate", {**_YARN, "truncate": False}),
        ("attention_factor", {**_YARN, "attention_factor": 1.3}),
        ("mscale_all_dim", _without(_YARN, "mscale_all_dim")),
        ("original_max_position", _without(_YARN, "original_max_position_embeddings")),
    )
    def test_foreign_rope_scaling_is_refused_by_name(self, name, scaling):
        with self.assertRaisesRegex(ConfigError, name):
            model_config_from_hugging_face({**_FIELDS, "rope_scaling": scaling})

    @parameterized.parameters("vocab_size", "q_lora_rank", "rms_norm_eps", "rope_theta")
    def test_missing_field_is_named(self, name):
        with self.assertRaisesRegex(ConfigError, name):
            model_config_from_hugging_face(_without(_FIELDS, name))

    def test_unreadable_files_are_named(self):
        folder = _folder(self)
        with self.assertRaisesRegex(ConfigError, "absent.json"):
            model_config_from_hugging_face(folder / "absent.json")
        (folder / "broken.json").write_text("{")
        with self.assertRaisesRegex(ConfigError, "broken.json"):
            model_config_from_hugging_face(folder / "broken.json")


if __name__ == "__main__":
    absltest.main()
