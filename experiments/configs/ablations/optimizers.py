"""How many tokens does MuonClip need to reach AdamW's final loss?

python tools/run_ablation.py optimizers

This is MuonClip's run at the full budget. The tool sweeps the learning rate of both optimizers,
gives MuonClip less and less of the tokens, each time with a whole schedule, and repeats the best
rates with other seeds. One run of it alone:

python -m experiments.train --config=experiments/configs/ablations/optimizers.py

A run takes 50 to 75 s on two processor cores. Expected: the best rates are 5.6e-3 for AdamW and
2.26e-2 for MuonClip, which with 65 % of the tokens is 0.01 to 0.06 nats better than AdamW with all
of them, and 0.23 to 0.30 nats with all (November 2026).
"""

import ml_collections

from kimi_jax.configs import convert
from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.configs.data import DataConfig, TokenizerConfig, TokenizerKind
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig
from kimi_jax.configs.training import TrainingConfig

_VOCAB_SIZE = 1024
_LENGTH = 128

MODEL = ModelConfig(
    vocab_size=_VOCAB_SIZE,
    embed_dim=96,
    num_layers=3,
    num_dense_layers=1,
    num_heads=4,
    q_latent_dim=48,
    kv_latent_dim=24,
    head_nope_dim=16,
    head_rope_dim=8,
    head_value_dim=16,
    dense_ffn_dim=256,
    expert_ffn_dim=48,
    num_routed_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    max_position=_LENGTH,
)


def experiment() -> ExperimentConfig:
    """Returns the run: warm-up over 5 %, cosine decay to a tenth over the second half."""
    return ExperimentConfig(
        model=MODEL,
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.BPE, vocab_size=_VOCAB_SIZE),
            sequence_length=_LENGTH,
            held_out_max_bytes=128 * 1024,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=2.26e-2, warmup_steps=8, decay_steps=80, final=2.26e-3)
        ),
        training=TrainingConfig(num_steps=160, batch_sequences=64, eval_every=20, sample_tokens=0),
        compute=ComputeConfig(dtype=ComputeDtype.FLOAT32),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
