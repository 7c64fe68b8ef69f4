"""How much of what rounding to INT4 costs does quantisation-aware training win back?

python tools/run_ablation.py int4

A model is trained until its rate is next to zero. Then it goes on at a tenth of the peak, which
falls to zero once more, with its routed experts in INT4, as Kimi K2 Thinking's became INT4 in a
last phase. The tool also trains it without, and measures the end of that run once more with its
routed experts rounded. Both runs are the same until the switch. The model is narrow, reads bytes
and consists of routed experts for the most part, since a model with few tokens for each of its
weights loses nothing by rounding.

It reads half a megabyte about eleven times, so that it has more weights than its text needs. With
fresh text QAT wins back about half of what PTQ loses on held-out text, whatever is varied; with
text that is read about ten times, two thirds. On the text that was trained on it wins back less
than half even then: with INT4 a model learns less of its text, but much of that is of this text
alone, and missing it costs nothing elsewhere. So this says how runs that read their text often
fare, and not that large models, which do not, win back as much.

A run takes two to five minutes on a processor core. BUILD_NOTES.md has the figures and what else
was tried.
"""

import dataclasses

import ml_collections

from experiments.configs.ablations import optimizers
from kimi_jax.configs import convert
from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.data import NUM_BPE_BASE_TOKENS, DataConfig
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.optimizer import Decay, OptimizerConfig, ScheduleConfig
from kimi_jax.configs.quantization import QuantizationConfig, WeightFormat

_PEAK = 2.26e-2
_FIRST_STEPS, _LAST_STEPS = 2200, 600  # before the switch, from it on

MODEL = dataclasses.replace(
    optimizers.MODEL,
    vocab_size=NUM_BPE_BASE_TOKENS + 1,
    num_layers=2,
    num_dense_layers=0,
    num_shared_experts=0,
    embed_dim=64,
    num_heads=2,
    q_latent_dim=32,
    kv_latent_dim=16,
    expert_ffn_dim=64,
)


def experiment() -> ExperimentConfig:
    """Returns the run: warm-up, linear decay to 1/200, and a second phase from a tenth to zero."""
    base = optimizers.experiment()
    return dataclasses.replace(
        base,
        model=MODEL,
        data=DataConfig(
            sequence_length=base.data.sequence_length,
            held_out_max_bytes=96 * 1024,
            train_max_bytes=512 * 1024,
        ),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(
                peak=_PEAK,
                warmup_steps=40,
                decay_steps=1900,
                decay=Decay.LINEAR,
                final=_PEAK / 200,
                anneal_steps=_LAST_STEPS,
                anneal_start=_PEAK / 10,
            )
        ),
        training=dataclasses.replace(
            base.training,
            num_steps=_FIRST_STEPS + _LAST_STEPS,
            batch_sequences=16,
            eval_every=200,
        ),
        compute=ComputeConfig(),
        quantization=QuantizationConfig(format=WeightFormat.INT4, start_step=_FIRST_STEPS),
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration; flags override options: --config.path.to.option=value."""
    return convert.to_config_dict(experiment())
