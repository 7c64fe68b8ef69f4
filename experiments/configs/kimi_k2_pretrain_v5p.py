"""Kimi K2, 1.03 T parameters, on 512 chips of TPU v5p (topology v5p:8x8x8).

    config=experiments/configs/kimi_k2_pretrain_v5p.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=v5p:8x8x8

Compiled for the topology, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.parallel import ParallelConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.experiment(
            parallel=ParallelConfig(data=8, expert=64),
            accumulation_steps=32,  # one sequence a chip
        )
    )
