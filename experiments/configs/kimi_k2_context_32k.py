"""Kimi K2's stage of 60 B tokens in sequences of 32,768, on 512 chips of TPU v5p (v5p:8x8x8).

    config=experiments/configs/kimi_k2_context_32k.py
    python tools/aot_compile.py --config=$config --topology=v5p:8x8x8

A sequence lies on eight chips, 4,096 tokens on each. Published are the tokens and where the rate
ends; that it falls linearly over the 460 B tokens of the anneal, so that this stage starts at
8.7e-6, is inferred. The stage starts from annealed weights, and no program here starts a run from
the weights of another yet.

Compiled for the topology, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.optimizer import ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig

_NUM_STEPS = 894  # 60 B tokens
_START_RATE = 8.7e-6  # 400/460 of the way from 2e-5 to 7e-6


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.context_stage(
            sequence_length=32_768,
            schedule=ScheduleConfig(
                peak=_START_RATE,
                stable_steps=0,
                anneal_steps=_NUM_STEPS,
                anneal_final=kimi_k2_recipe.FINAL_RATE,
            ),
            num_steps=_NUM_STEPS,
            parallel=ParallelConfig(data=1, expert=64, context=8),
            accumulation_steps=32,
        )
    )
