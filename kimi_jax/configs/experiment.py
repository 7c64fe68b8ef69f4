"""The root of a run's configuration, and the checks that need two of its parts."""

import dataclasses
import math

from kimi_jax.configs.checks import check_fields
from kimi_jax.configs.compute import ComputeConfig
from kimi_jax.configs.data import DataConfig
from kimi_jax.configs.model import ModelConfig
from kimi_jax.configs.optimizer import OptimizerConfig
from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.configs.quantization import QuantizationConfig
from kimi_jax.configs.training import TrainingConfig
from kimi_jax.core.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that decides a pre-training run.

    Attributes:
      model: the architecture.
      data: the corpus, its tokenizer and how it is packed.
      optimizer: how parameters move.
      training: for how long, and what is kept.
      compute: formats, kernels and memory.
      parallel: the mesh.
      quantization: which weights are rounded while they are trained.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    quantization: QuantizationConfig = dataclasses.field(default_factory=QuantizationConfig)

    def __post_init__(self):
        check_fields(self, "config")
        require(
            self.data.sequence_length <= self.model.max_position,
            f"data.sequence_length ({self.data.sequence_length}) exceeds model.max_position "
            f"({self.model.max_position})",
        )
        require(
            self.quantization.start_step < self.training.num_steps,
            f"quantization.start_step ({self.quantization.start_step}) must be less than "
            f"training.num_steps ({self.training.num_steps}), or nothing is ever quantised",
        )
        self._check_axes()

    def _check_axes(self) -> None:
        """Raises `ConfigError` unless mesh axes divide what they split and a user can choose."""
        axes, model = self.parallel, self.model
        tensor = (axes.tensor, f"parallel.tensor ({axes.tensor})")
        context = (axes.context, f"parallel.context ({axes.context})")
        both = (axes.context * axes.tensor, f"{context[1]} * {tensor[1]}")
        splits = [
            (context, "data.sequence_length", self.data.sequence_length),
            (both, "model.num_heads", model.num_heads),
            (tensor, "model.vocab_size", model.vocab_size),
        ]
        if model.num_dense_layers:
            splits.append((tensor, "model.dense_ffn_dim", model.dense_ffn_dim))
        if model.num_moe_layers:
            pipe = (axes.pipe, f"parallel.pipe ({axes.pipe})")
            splits.append((pipe, "the number of mixture blocks", model.num_moe_layers))
            splits.append((tensor, "model.expert_ffn_dim", model.expert_ffn_dim))
        for (shards, option), split, size in splits:
            require(
                size % shards == 0,
                f"{option} must divide {split} ({size}), which it splits; "
                f"{math.gcd(size, shards)} would fit, or a multiple of {shards} in {split}",
            )

    def at_step(self, step: int) -> "ExperimentConfig":
        """Returns the run as it is at a step: weights are rounded from `start_step` on."""
        if step >= self.quantization.start_step:
            return self
        return dataclasses.replace(self, quantization=QuantizationConfig())

    @property
    def batch_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.training.batch_sequences * self.data.sequence_length
