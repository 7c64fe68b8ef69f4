"""Kimi K2 trained for INT4 experts, on 512 chips of TPU v5p (topology v5p:8x8x8).

    config=experiments/configs/kimi_k2_qat_int4.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=v5p:8x8x8

The published recipe at its lowest rate, with the routed experts rounded from the first step. K2
Thinking was trained for INT4 after pre-training; for how long and at which rate is not published:
this run's 1,000 steps at a constant 7e-6 are this project's choice. Compiled for the topology,
never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import dataclasses

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat

_STEPS = 1_000


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    start = kimi_k2_recipe.experiment(
        parallel=ParallelConfig(data=8, expert=64),
        accumulation_steps=32,  # one sequence a chip
    )
    rate = ScheduleConfig(peak=kimi_k2_recipe.FINAL_RATE)
    return convert.to_config_dict(
        dataclasses.replace(
            start,
            optimizer=OptimizerConfig(schedule=rate),
            training=dataclasses.replace(start.training, num_steps=_STEPS),
            quantization=QuantizationConfig(format=WeightFormat.INT4),
        )
    )
