"""How much of what rounding to INT4 costs does quantisation-aware training win back?

python tools/run_ablation.py int4

This is the run whose routed experts are INT4 in its last fifth, as Kimi K2 Thinking's became in
its last phase of training. The tool also trains it without, and measures the end of that run once
more with its routed experts rounded. Both runs are the same until the switch. The model is narrow
and reads bytes, since a model with few tokens for each of its weights loses nothing by rounding.

A run takes 95 to 200 s on two busy processor cores. Found in nats per byte, mean of three seeds:
rounding afterwards loses 0.008 and training with INT4 0.006, which is more than the third that was
hoped for; BUILD_NOTES.md has what was tried (November 2026).
"""

import dataclasses

import ml_collections

from experiments.configs.ablations import optimizers
from kimi_jax.configs import convert
from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.data import NUM_BPE_BASE_TOKENS, DataConfig
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat

_NUM_STEPS = 800

MODEL = dataclasses.replace(
    optimizers.MODEL,
    vocab_size=NUM_BPE_BASE_TOKENS + 1,
    embed_dim=32,
    num_heads=2,
    q_latent_dim=32,
    kv_latent_dim=16,
    dense_ffn_dim=96,
    expert_ffn_dim=32,
)


def experiment() -> ExperimentConfig:
    """Returns the run: warm-up over 5 %, cosine decay to a tenth over the second half."""
    base = optimizers.experiment()
    return dataclasses.replace(
        base,
        model=MODEL,
        data=DataConfig(sequence_length=base.data.sequence_length, held_out_max_bytes=96 * 1024),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(
                peak=2.26e-2, warmup_steps=40, decay_steps=_NUM_STEPS // 2, final=2.26e-3
            )
        ),
        training=dataclasses.replace(
            base.training, num_steps=_NUM_STEPS, batch_sequences=16, eval_every=100
        ),
        compute=ComputeConfig(),
        quantization=QuantizationConfig(format=WeightFormat.INT4, start_step=_NUM_STEPS * 4 // 5),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
