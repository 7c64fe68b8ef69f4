"""Kimi K2, 1.03 T parameters, on 1,024 chips of TPU v6e: four slices of the topology v6e:16x16.

    config=experiments/configs/kimi_k2_pretrain_v6e.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=v6e:16x16 --num_slices=4

A slice has at most 256 chips of 32 GB, which do not hold the state of the run. So the weights are
split over all slices, and their gathers cross the network between them.

Compiled for the topology, never run. Memory and predicted time stand in BUILD_NOTES.md.
"""

import ml_collections

from experiments.configs import kimi_k2_recipe
from kimi_jax.configs import convert
from kimi_jax.configs.compute import ComputeConfig, Remat
from kimi_jax.configs.parallel import ParallelConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        kimi_k2_recipe.experiment(
            parallel=ParallelConfig(data=16, expert=64, cross_slices=True),
            compute=ComputeConfig(
                remat=Remat.FULL, logits_chunk_tokens=1024, exchange_capacity=1.25
            ),
            accumulation_steps=16,  # one sequence a chip
        )
    )
