"""What the pre-training runs of Kimi K2 have in common: the published recipe (arXiv 2507.20534).

Section 2.5: sequences of 4,096 tokens in batches of 67 M; 500 steps of warm-up to 2e-4, constant
up to 10 T tokens, a cosine to 2e-5 over 5.5 T; weight decay 0.1, tau 100. Towards the end the rate
falls from 2e-5 to 7e-6, over 400 B tokens in sequences of 4,096 and 60 B in sequences of 32 K; YaRN
extends the context to 128 K. Momentum, AdamW's betas, the clipping of gradients and the rate of the
selection biases are not published; they are this project's defaults. The corpus is the user's:
`data/` beside the program, or overrides.
"""

import dataclasses

from kimi_jax.configs import presets
from kimi_jax.configs.compute import ComputeConfig, Remat
from kimi_jax.configs.data import (
    DataConfig,
    SourceConfig,
    SourceKind,
    TokenizerConfig,
    TokenizerKind,
)
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import MomentumDtype, OptimizerConfig, ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.training import TrainingConfig

SEQUENCE_LENGTH = 4096
BATCH_SEQUENCES = 16_384  # 67,108,864 tokens
BATCH_TOKENS = BATCH_SEQUENCES * SEQUENCE_LENGTH
_WARMUP_STEPS = 500
_STABLE_STEPS = round(10e12 / BATCH_TOKENS) - _WARMUP_STEPS
_DECAY_STEPS = round(5.5e12 / BATCH_TOKENS)
FINAL_RATE = 7e-6


def experiment(
    *,
    parallel: ParallelConfig,
    accumulation_steps: int,
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32,
) -> ExperimentConfig:
    """Returns the whole run, laid out as given."""
    return ExperimentConfig(
        # Pre-training ran at the native context; YaRN came with the extension.
        model=dataclasses.replace(presets.kimi_k2(), yarn=None, max_position=SEQUENCE_LENGTH),
        data=DataConfig(
            tokenizer=TokenizerConfig(kind=TokenizerKind.KIMI, path="data/tokenizer"),
            sources={"corpus": SourceConfig(kind=SourceKind.ARRAY_RECORD, path="data/corpus")},
            sequence_length=SEQUENCE_LENGTH,
            held_out_fraction=1e-6,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(
                peak=2e-4,
                warmup_steps=_WARMUP_STEPS,
                stable_steps=_STABLE_STEPS,
                decay_steps=_DECAY_STEPS,
                final=2e-5,
            ),
            momentum_dtype=momentum_dtype,
        ),
        training=TrainingConfig(
            num_steps=_WARMUP_STEPS + _STABLE_STEPS + _DECAY_STEPS,
            batch_sequences=BATCH_SEQUENCES,
            accumulation_steps=accumulation_steps,
            eval_every=1000,
            checkpoint_every=250,
        ),
        # Of each layer a device keeps the input alone, and the exchange has room for a quarter more
        # rows than an even load brings.
        compute=ComputeConfig(remat=Remat.FULL, logits_chunk_tokens=1024, exchange_capacity=1.25),
        parallel=parallel,
    )


def context_stage(
    *,
    sequence_length: int,
    schedule: ScheduleConfig,
    num_steps: int,
    parallel: ParallelConfig,
    accumulation_steps: int,
) -> ExperimentConfig:
    """Returns a stage of longer sequences, in batches of as many tokens, with the released YaRN.

    That the batch keeps its tokens, and YaRN already acts at 32 K, is inferred.
    """
    start = experiment(parallel=parallel, accumulation_steps=accumulation_steps)
    return dataclasses.replace(
        start,
        model=presets.kimi_k2(),
        data=dataclasses.replace(start.data, sequence_length=sequence_length),
        optimizer=OptimizerConfig(schedule=schedule),
        training=dataclasses.replace(
            start.training,
            num_steps=num_steps,
            batch_sequences=BATCH_TOKENS // sequence_length,
        ),
    )
