"""Kimi K2, 1.03 T parameters, on 256 chips of TPU7x (Ironwood), topology tpu7x:8x8x4.

    config=experiments/configs/kimi_k2_pretrain_tpu7x.py
    python -m experiments.train --config=$config --coordinator=auto
    python tools/aot_compile.py --config=$config --topology=tpu7x:8x8x4

JAX sees each chip as two devices of 96 GB, so that the mesh has 512.

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
            accumulation_steps=8,  # four sequences a device
        )
    )
