"""Kimi K2, 1.03 T parameters, on 1,024 chips of TPU v6e: four slices of the topology v6e:16x16.

    config=experiments/configs/kimi_k2_pretrain_v6e.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=v6e:16x16 --num_slices=4

A slice has at most 256 chips of 32 GB, which do not hold the state of the run. So each slice is a
stage of a pipeline: activations travel between slices, and once a step all weights and gradients.
Momentum is kept in bfloat16, to leave room.

Compiled for the topology, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.optimizer import MomentumDtype
from kimi_jax.configs.parallel import ParallelConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.experiment(
            parallel=ParallelConfig(pipe=4, data=4, expert=64),
            accumulation_steps=16,  # one sequence a chip
            momentum_dtype=MomentumDtype.BFLOAT16,
        )
    )
