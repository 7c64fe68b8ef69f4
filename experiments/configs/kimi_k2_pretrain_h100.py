"""Kimi K2, 1.03 T parameters, on 1,024 H100 GPUs of 80 GB, eight to a node.

    config=experiments/configs/kimi_k2_pretrain_h100.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=h100:1024

Compiled for the GPUs, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.parallel import ParallelConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.experiment(
            parallel=ParallelConfig(data=16, expert=64),
            accumulation_steps=4,  # four sequences a GPU
        )
    )
