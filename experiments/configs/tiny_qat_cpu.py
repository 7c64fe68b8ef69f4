"""Does training go on unharmed when the routed experts become INT4 half way? The run of tiny_cpu.

    python -m experiments.train --config=experiments/configs/tiny_qat_cpu.py

The first 110 steps are those of tiny_cpu. Then codes from -7 to 7 with a scale for every 32 stand
for the routed experts in all products, as Kimi K2 Thinking was trained, which also began with
weights trained without; held-out text is measured with them from there on.
"""

import dataclasses

import ml_collections

from experiments.configs import tiny_cpu
from kimi_jax.configs import convert
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat

_SWITCH_STEP = 110


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(
        dataclasses.replace(
            tiny_cpu.experiment(),
            quantization=QuantizationConfig(format=WeightFormat.INT4, start_step=_SWITCH_STEP),
        )
    )
