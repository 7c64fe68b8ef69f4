"""Does the whole machine work? A tiny K2 learns Python's library on eight simulated devices.

    python -m experiments.train --config=experiments/configs/tiny_cpu.py

Two CPU cores, 2 min 49 s from the command to the report with Python 3.11 (tokenising and compiling
included). Held-out text: 1.90 bits per byte, where the entropy of its bytes is 4.70 and gzip -9
takes 2.03. Last true on 2026-11-23.
"""

import ml_collections

from kimi_jax.configs import convert, presets
from kimi_jax.configs.data import DataConfig, TokenizerConfig, TokenizerKind
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import OptimizerConfig, ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.training import TrainingConfig

_VOCAB_SIZE = 2048


def experiment() -> ExperimentConfig:
    """Returns the run."""
    return ExperimentConfig(
        model=presets.tiny(vocab_size=_VOCAB_SIZE),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.BPE, vocab_size=_VOCAB_SIZE),
            sequence_length=256,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=1e-2, warmup_steps=20, decay_steps=120, final=1e-3)
        ),
        training=TrainingConfig(
            num_steps=220, batch_sequences=16, eval_every=55, checkpoint_every=55
        ),
        parallel=ParallelConfig(simulated_devices=8),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
