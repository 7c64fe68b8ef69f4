import dataclasses

from absl.testing import absltest, parameterized

from kimi_jax.configs import presets
from kimi_jax.configs.model import YarnConfig
from kimi_jax.core.errors import ConfigError


class ModelConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(num_heads=0), "model.num_heads must be greater than 0"),
        (dict(num_heads=True), "model.num_heads must be an integer, got True"),
        (dict(head_rope_dim=5), "model.head_rope_dim must be even"),
        (dict(num_dense_layers=9), r"model.num_dense_layers must be between 0 and .*\(4\)"),
        (dict(num_expert_groups=3), "must be a multiple of model.num_expert_groups"),
        (dict(experts_per_token=17), r"experts_per_token \(17\) exceeds the 16 experts"),
        (dict(expert_groups_per_token=2), "exceeds model.num_expert_groups"),
        (dict(num_expert_groups=16), "fewer than 2 experts"),
        (
            dict(num_expert_groups=8, expert_groups_per_token=1),
            "exceeds the 2 experts that a token may choose",
        ),
        (dict(num_shared_experts=-1), "model.num_shared_experts must not be negative"),
        (dict(norm_eps=0.0), "model.norm_eps must be greater than 0"),
    )
    def test_an_impossible_value_is_named(self, change, message):
        with self.assertRaisesRegex(ConfigError, message):
            dataclasses.replace(presets.tiny(vocab_size=64), **change)

    def test_none_stands_for_off_where_it_may(self):
        config = dataclasses.replace(presets.tiny(vocab_size=64), q_latent_dim=None)
        self.assertIsNone(config.q_latent_dim)

    def test_yarn_is_checked_too(self):
        with self.assertRaisesRegex(ConfigError, "model.yarn.factor must be greater than 0"):
            YarnConfig(factor=0.0, original_max_position=4096)


if __name__ == "__main__":
    absltest.main()
