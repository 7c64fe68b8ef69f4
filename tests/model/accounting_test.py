import dataclasses

import numpy as np
from absl.testing import absltest

from kimi_jax.configs import presets
from kimi_jax.configs.model import ModelConfig
from kimi_jax.core import param_spec
from kimi_jax.model import accounting, transformer

# The shape that frameworks are compared at (tools/bench_train.py): 37.6 model GFLOP a step.
_COMPARISON = ModelConfig(
    vocab_size=512,
    embed_dim=256,
    num_layers=4,
    num_dense_layers=1,
    num_heads=8,
    q_latent_dim=96,
    kv_latent_dim=64,
    head_nope_dim=32,
    head_rope_dim=16,
    head_value_dim=32,
    dense_ffn_dim=512,
    expert_ffn_dim=128,
    num_routed_experts=16,
    num_shared_experts=1,
    experts_per_token=4,
)


def _uses_per_token(spec, config):
    """How much of a parameter one token passes through."""
    if param_spec.ROUTED_EXPERT in spec.tags:
        return config.experts_per_token / config.num_routed_experts
    return 1


def _core_flops_by_pairs(config, length):
    """Adds up every (query, key) pair that causal attention has."""
    seen = np.tril(np.ones((length, length)))
    scores = seen * 2 * (config.head_nope_dim + config.head_rope_dim)
    weighted = seen * 2 * config.head_value_dim
    return config.num_layers * config.num_heads * (scores + weighted).sum() / length


class AccountingTest(absltest.TestCase):
    def test_a_step_of_the_comparison_shape_is_37_6_gflop(self):
        flops = accounting.train_flops_per_step(_COMPARISON, batch_sequences=8, sequence_length=256)
        self.assertAlmostEqual(flops / 1e9, 37.6, delta=0.05)

    def test_products_with_weights_are_those_of_the_plan(self):
        for config in (_COMPARISON, presets.moonlight_16b(), presets.kimi_k2()):
            flops = accounting.flops_per_token(config, sequence_length=32)
            products = sum(
                2 * spec.size * _uses_per_token(spec, config)
                for _, spec in param_spec.named_specs(transformer.specs(config))
                if spec.kind in (param_spec.MATRIX, param_spec.HEAD)
            )
            self.assertEqual(flops.total - flops.attention_core, products)

    def test_attention_core_counts_every_causal_pair_once(self):
        config = dataclasses.replace(_COMPARISON, num_heads=3, head_value_dim=20)
        for length in (1, 2, 37):
            counted = accounting.flops_per_token(config, length).attention_core
            self.assertEqual(counted, _core_flops_by_pairs(config, length))

    def test_every_part_is_named_and_the_parts_add_up(self):
        flops = accounting.flops_per_token(_COMPARISON, sequence_length=256)
        swiglu = 2 * 3 * 256
        self.assertEqual(flops.dense_ffn, swiglu * 512)
        self.assertEqual(flops.shared_experts, 3 * swiglu * 128)
        self.assertEqual(flops.routed_experts, 3 * swiglu * 128 * 4)
        self.assertEqual(flops.router, 3 * 2 * 256 * 16)
        self.assertEqual(flops.head, 2 * 256 * 512)
        self.assertEqual(flops.total, sum(dataclasses.asdict(flops).values()))

    def test_kimi_k2_has_the_parameters_of_its_released_checkpoint(self):
        # The sum over the 139,644 tensors of moonshotai/Kimi-K2-Instruct, without the scales of
        # its 8-bit format.
        self.assertEqual(accounting.total_parameters(presets.kimi_k2()), 1_026_408_232_448)

    def test_kimi_k2_activates_32_86_billion_parameters(self):
        active = accounting.active_parameters(presets.kimi_k2())
        self.assertAlmostEqual(active / 1e9, 32.86, delta=0.005)

    def test_parameter_counts_are_those_of_the_plan(self):
        for config in (_COMPARISON, presets.moonlight_16b()):
            specs = [spec for _, spec in param_spec.named_specs(transformer.specs(config))]
            total = sum(spec.size for spec in specs)
            active = sum(spec.size * _uses_per_token(spec, config) for spec in specs)
            self.assertEqual(accounting.total_parameters(config), total)
            self.assertEqual(accounting.active_parameters(config), active)


if __name__ == "__main__":
    absltest.main()
