"""How much of what rounding to INT4 costs does quantisation-aware training win back?

python tools/run_ablation.py int4

This is the run whose routed experts are INT4 in its second half. The tool also trains it without,
and measures the end of that run once more with its routed experts rounded. Both runs are the same
until the switch.
"""

import dataclasses

import ml_collections

from experiments.configs.ablations import optimizers
from kimi_jax.configs import convert
from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat

_NUM_STEPS = 320


def experiment() -> ExperimentConfig:
    """Returns the run: warm-up over 5 %, cosine decay to a tenth over the second half."""
    base = optimizers.experiment()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, embed_dim=64, expert_ffn_dim=32, dense_ffn_dim=160),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=2.26e-2, warmup_steps=16, decay_steps=160, final=2.26e-3)
        ),
        training=dataclasses.replace(
            base.training, num_steps=_NUM_STEPS, batch_sequences=32, eval_every=40
        ),
        compute=ComputeConfig(),
        quantization=QuantizationConfig(format=WeightFormat.INT4, start_step=_NUM_STEPS // 2),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
