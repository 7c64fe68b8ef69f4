"""Kimi K2 in sequences of 131,072 tokens, on 512 chips of TPU v5p (topology v5p:8x8x8).

    config=experiments/configs/kimi_k2_context_128k.py
    python tools/aot_compile.py --config=$config --topology=v5p:8x8x8

A sequence lies on sixteen chips, 8,192 tokens on each. That YaRN extends the context to 128 K is
published; whether anything was trained at that length is not: 100 steps (6.7 B tokens) at the last
rate, 7e-6, are this project's choice. The stage starts from the weights of the stage before, and no
program here starts a run from the weights of another yet.

Compiled for the topology, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.optimizer import ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.context_stage(
            sequence_length=131_072,
            schedule=ScheduleConfig(peak=kimi_k2_recipe.FINAL_RATE),
            num_steps=100,
            parallel=ParallelConfig(data=1, expert=32, context=16),
            accumulation_steps=16,
        )
    )
