"""The smallest experiment that has every part of the architecture, and batches for it."""

import dataclasses
import functools
import math
import pathlib

import jax
import numpy as np

from kimi_jax.configs.compute import ComputeConfig, ComputeDtype
from kimi_jax.configs.data import DataConfig, SourceConfig, SourceKind
from kimi_jax.configs.experiment import ExperimentConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.optimizer import NewtonSchulzDtype, OptimizerConfig, ScheduleConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.training import TrainingConfig
from kimi_jax.core.param_spec import NORM, ROUTED_EXPERT, ParamSpec, map_specs
from kimi_jax.data.batches import Batch
from kimi_jax.data.device_feed import put_batch
from kimi_jax.model import transformer
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.placement import abstract_parameters
from kimi_jax.parallel.rules import TOKENS
from kimi_jax.quantization import int4

# Weights so large that routing, attention and gradients are far from the ties and zeros of a model
# at its usual initialisation.
INIT_STD = 0.2
MODEL = ModelConfig(
    vocab_size=64,
    embed_dim=32,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    q_latent_dim=16,
    kv_latent_dim=16,
    head_nope_dim=8,
    head_rope_dim=4,
    head_value_dim=8,
    dense_ffn_dim=48,
    expert_ffn_dim=16,
    num_routed_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    max_position=64,
    init_std=INIT_STD,
)
NUM_ROWS = 32  # of a batch: 8 devices x 4 micro-batches
LENGTH = 32


def experiment(**sections: dict) -> ExperimentConfig:
    """Returns the tiny experiment in float32, with options replaced section by section.

    Args:
      **sections: such as `training={"num_steps": 3}`.
    """
    config = ExperimentConfig(
        model=MODEL,
        data=DataConfig(sequence_length=LENGTH, num_threads=0),
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak=1e-2),
            newton_schulz_dtype=NewtonSchulzDtype.FLOAT32,
        ),
        training=TrainingConfig(num_steps=4, batch_sequences=NUM_ROWS, sample_tokens=0),
        compute=ComputeConfig(dtype=ComputeDtype.FLOAT32),
    )
    parts = {
        name: dataclasses.replace(getattr(config, name), **options)
        for name, options in sections.items()
    }
    return dataclasses.replace(config, **parts)


def mesh(data: int, expert: int, **others: int) -> jax.sharding.Mesh:
    """Returns a mesh over as many devices as it needs; axes that are not named have size 1."""
    config = ParallelConfig(data=data, expert=expert, **others)
    return make_mesh(config, MODEL.num_routed_experts)


@functools.cache
def host_parameters(model: ModelConfig = MODEL) -> transformer.TransformerParams:
    """Random values; NumPy draws them in no time, where a program would be compiled for long."""
    random = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> np.ndarray:
        values = random.normal(0.0, INIT_STD, spec.shape)
        return np.float32(np.ones(spec.shape) if spec.kind == NORM else values)

    return map_specs(draw, transformer.specs(model))


def parameters(on: jax.sharding.Mesh, model: ModelConfig = MODEL) -> transformer.TransformerParams:
    """Returns `host_parameters` as they are stored on a mesh."""
    like = abstract_parameters(transformer.specs(model), on)
    return jax.tree.map(
        lambda leaf, at: jax.device_put(leaf, at.sharding), host_parameters(model), like
    )


def round_experts(
    params: transformer.TransformerParams, group_size: int
) -> transformer.TransformerParams:
    """Returns parameters of `MODEL` with the values that INT4 rounds its routed experts to."""

    def convert(spec: ParamSpec, leaf: jax.Array) -> jax.Array:
        if ROUTED_EXPERT not in spec.tags:
            return leaf
        return int4.dequantize(int4.quantize(leaf, group_size), leaf.dtype)

    return map_specs(convert, transformer.specs(MODEL), params)


def host_batch(*, seed: int = 0, rows: int = NUM_ROWS) -> Batch:
    """Returns random rows of two documents each whose loss weights differ from row to row."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, MODEL.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    place = np.arange(LENGTH)
    first = random.integers(4, LENGTH - 4, (rows, 1))  # length of a row's first document
    weights = np.where(place == first - 1, 0.0, random.uniform(0.0, 1.0, (rows, LENGTH)))
    weights *= np.linspace(0.1, 2.0, math.gcd(rows, 4))[np.arange(rows) % math.gcd(rows, 4), None]
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=np.where(place < first, 1, 2).astype(np.int32),
        positions=np.where(place < first, place, place - first).astype(np.int32),
        weights=weights.astype(np.float32),
    )


def batch(on: jax.sharding.Mesh, *, seed: int = 0, rows: int = NUM_ROWS) -> Batch:
    """Returns `host_batch` on a mesh."""
    return put_batch(host_batch(seed=seed, rows=rows), jax.NamedSharding(on, TOKENS))


BYTE_VOCABULARY = 260  # of a model for the tokenizer of bytes, 259


def write_corpus(folder: pathlib.Path) -> None:
    """Writes sixteen small documents, of which some are held out at a fraction of 0.3."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = ["matrix", "expert", "router", "token", "head", "clip", "muon", "scale", "norm"]
    for number in range(16):
        text = " ".join(random.choice(words, 60))
        (folder / f"{number}.txt").write_text(text)


def text_experiment(folder: pathlib.Path, **sections: dict) -> ExperimentConfig:
    """Returns the tiny experiment on the documents of `folder / "corpus"`."""
    data = {
        "sources": {"text": SourceConfig(kind=SourceKind.TEXT, path=str(folder / "corpus"))},
        "held_out_fraction": 0.3,
        "cache_dir": str(folder / "cache"),
    } | sections.pop("data", {})
    model = {"vocab_size": BYTE_VOCABULARY} | sections.pop("model", {})
    return experiment(data=data, model=model, **sections)


def warm_up(num_steps: int) -> ScheduleConfig:
    """Returns a schedule that needs at least `num_steps`."""
    return ScheduleConfig(peak=1e-2, warmup_steps=num_steps)
