"""How long to train, on how much at a time, and what to keep."""

import dataclasses

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The run.

    Attributes:
      num_steps: optimizer steps.
      batch_sequences: sequences of `data.sequence_length` tokens in one optimizer step.
      accumulation_steps: equal micro-batches a step is computed in.
      seed: of initial weights; `data.seed` orders the data.
      initial_weights: folder of a published checkpoint (config.json, safetensors) of this
        architecture whose weights the first step starts from; None draws them.
      log_every: steps between two lines of metrics.
      eval_every: steps between two measurements on held-out text; None measures at the end only.
      checkpoint_every: steps between two checkpoints; None saves at the end only.
      checkpoints_to_keep: newest checkpoints kept on disk.
      sample_tokens: length of the text generated for the report; 0 generates none.
    """

    num_steps: int
    batch_sequences: int
    accumulation_steps: int = 1
    seed: int = 0
    initial_weights: str | None = None
    log_every: int = 1
    eval_every: int | None = None
    checkpoint_every: int | None = None
    checkpoints_to_keep: int = 2
    sample_tokens: int = 200

    def __post_init__(self):
        check_fields(self, "training")
        require_positive(
            self,
            "training",
            "num_steps",
            "batch_sequences",
            "accumulation_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "checkpoints_to_keep",
        )
        require(
            self.sample_tokens >= 0,
            f"training.sample_tokens must not be negative, got {self.sample_tokens}",
        )
        require(
            self.batch_sequences % self.accumulation_steps == 0,
            f"training.batch_sequences ({self.batch_sequences}) must be a multiple of "
            f"training.accumulation_steps ({self.accumulation_steps})",
        )
