"""Published models of the family, and a tiny one of the same architecture."""

import dataclasses

from kimi_jax.configs.model import ModelConfig, YarnConfig


def kimi_k2() -> ModelConfig:
    """Kimi K2 as released in July 2025: 1.03 T parameters, context 131072.

    Pre-training ran at 4096 tokens without YaRN, which came with the extension to 128 K
    (arXiv 2507.20534, sections 2.3 and 2.5):

        dataclasses.replace(kimi_k2(), yarn=None, max_position=4096)
    """
    return ModelConfig(
        vocab_size=163_840,
        embed_dim=7168,
        num_layers=61,
        num_dense_layers=1,
        num_heads=64,
        q_latent_dim=1536,
        kv_latent_dim=512,
        head_nope_dim=128,
        head_rope_dim=64,
        head_value_dim=128,
        dense_ffn_dim=18_432,
        expert_ffn_dim=2048,
        num_routed_experts=384,
        num_shared_experts=1,
        experts_per_token=8,
        routed_scaling_factor=2.827,
        rope_theta=50_000.0,
        yarn=YarnConfig(factor=32.0, original_max_position=4096, beta_fast=1.0, beta_slow=1.0),
        max_position=131_072,
        norm_eps=1e-6,
        init_std=0.02,
    )


def kimi_k2_thinking() -> ModelConfig:
    """The sizes of Kimi K2 with the constants of its INT4 family, context 262144.

    The constants are those of the text_config of Kimi K2.5.
    """
    return dataclasses.replace(
        kimi_k2(),
        yarn=YarnConfig(factor=64.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0),
        max_position=262_144,
        norm_eps=1e-5,
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B: the same architecture at 16 B parameters, without a query latent.

    Constants from arXiv 2502.16982, appendix C; it counts 15.29 B, without embedding and head.
    """
    return ModelConfig(
        vocab_size=163_840,
        embed_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_latent_dim=None,
        kv_latent_dim=512,
        head_nope_dim=128,
        head_rope_dim=64,
        head_value_dim=128,
        dense_ffn_dim=11_264,
        expert_ffn_dim=1408,
        num_routed_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        routed_scaling_factor=2.446,
        rope_theta=50_000.0,
        max_position=8192,
        norm_eps=1e-5,
        init_std=0.02,
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3 and R1, 671 B parameters, without their multi-token prediction layer.

    Constants from arXiv 2412.19437, section 4.2, and the released config.json.
    """
    return ModelConfig(
        vocab_size=129_280,
        embed_dim=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_latent_dim=1536,
        kv_latent_dim=512,
        head_nope_dim=128,
        head_rope_dim=64,
        head_value_dim=128,
        dense_ffn_dim=18_432,
        expert_ffn_dim=2048,
        num_routed_experts=256,
        num_shared_experts=1,
        experts_per_token=8,
        num_expert_groups=8,
        expert_groups_per_token=4,
        routed_scaling_factor=2.5,
        rope_theta=10_000.0,
        yarn=YarnConfig(factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0),
        max_position=163_840,
        norm_eps=1e-6,
        init_std=0.02,
    )


def tiny(*, vocab_size: int) -> ModelConfig:
    """K2's architecture, small enough to train on a laptop's processor, at its native context.

    The routed scaling factor follows the rule that K2's comes from. Other sizes by
    `dataclasses.replace`.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=128,
        num_layers=4,
        num_dense_layers=1,
        num_heads=4,
        q_latent_dim=64,
        kv_latent_dim=32,
        head_nope_dim=32,
        head_rope_dim=16,
        head_value_dim=32,
        dense_ffn_dim=320,
        expert_ffn_dim=64,
        num_routed_experts=16,
        num_shared_experts=1,
        experts_per_token=4,
        max_position=1024,
    )
