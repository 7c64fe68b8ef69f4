"""Does QK-clip hold the attention logits at tau, and does the loss stay smooth?

python tools/run_ablation.py stability

A learning rate so high that plain Muon's largest logit passes tau, held after warm-up. The tool
runs it without the clip and with it. tau is 30, that of K2's own ablation at small scale
(arXiv 2507.20534, appendix D); K2 itself trained with 100. One run of it alone:

python -m experiments.train --config=experiments/configs/ablations/stability.py

Both runs took seven minutes on two busy processor cores. Expected with seed 0: the largest logit
reaches 99 without the clip and 40 with it, its median since it first passed tau is 56 and 29; the
loss ends at 4.13 in both and has no spike (November 2026).
"""

import dataclasses

import ml_collections

from experiments.configs.ablations import optimizers
from kimi_jax.configs import convert
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig

_TAU = 30.0
_PEAK = 6.4e-2


def experiment() -> ExperimentConfig:
    """Returns the run with the clip."""
    base = optimizers.experiment()
    return dataclasses.replace(
        base,
        training=dataclasses.replace(
            base.training, num_steps=320, batch_sequences=16, eval_every=40
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=_PEAK, warmup_steps=16), qk_clip_threshold=_TAU
        ),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
