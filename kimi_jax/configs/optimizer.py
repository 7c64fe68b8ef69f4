"""The optimizer and its schedule."""

import dataclasses
import enum

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import require


class Decay(enum.Enum):
    """How the learning rate goes from its peak to its final value."""

    CONSTANT = "constant"  # not at all
    COSINE = "cosine"  # half a cosine
    LINEAR = "linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable phase, decay, and an optional anneal (WSD; arXiv 2507.20534, section 2.5).

    The learning rate rises linearly over `warmup_steps`, stays at `peak` for `stable_steps`, decays
    to `final` over `decay_steps`, and, where `anneal_steps` is not 0, goes on linearly to
    `anneal_final`, from `anneal_start` where that is given. After the last phase it stays where it
    is.

    Attributes:
      peak: learning rate after warm-up.
      warmup_steps: steps of linear warm-up from 0; the first step already has peak / warmup_steps.
      stable_steps: steps at `peak`; None fills what the other phases leave of the run.
      decay_steps: steps of decay.
      decay: shape of the decay.
      final: learning rate after the decay.
      anneal_steps: steps of the linear anneal that follows.
      anneal_start: learning rate that the anneal falls from; None takes the one before it. A higher
        one trains a model that has settled once more, as a second phase of training does.
      anneal_final: learning rate after the anneal.
    """

    peak: float
    warmup_steps: int = 0
    stable_steps: int | None = None
    decay_steps: int = 0
    decay: Decay = Decay.COSINE
    final: float = 0.0
    anneal_steps: int = 0
    anneal_start: float | None = None
    anneal_final: float = 0.0

    def __post_init__(self):
        section = "optimizer.schedule"
        check_fields(self, section)
        require_positive(self, section, "peak", "anneal_start")
        for name in ("warmup_steps", "decay_steps", "anneal_steps", "final", "anneal_final"):
            value = getattr(self, name)
            require(value >= 0, f"{section}.{name} must not be negative, got {value}")
        require(
            self.stable_steps is None or self.stable_steps >= 0,
            f"{section}.stable_steps must not be negative, got {self.stable_steps}",
        )


class OptimizerName(enum.Enum):
    """Which rule updates the matrices; embedding, head and norms always use AdamW."""

    MUON_CLIP = "muon_clip"
    ADAMW = "adamw"


class NewtonSchulzPreset(enum.Enum):
    """Coefficients of the iteration; `optimizers/newton_schulz.py` has the numbers."""

    JORDAN = "jordan"  # K2's and Moonlight's
    YOU = "you"
    POLAR_EXPRESS = "polar_express"


class NewtonSchulzDtype(enum.Enum):
    """Format of the products inside the Newton-Schulz iteration."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class MomentumDtype(enum.Enum):
    """Format in which Muon's momentum is kept between steps."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"  # half the memory; computed in float32 and rounded once a step


class MatrixGranularity(enum.Enum):
    """What Muon treats as one matrix among attention's projections."""

    FUSED = "fused"  # as checkpoints store them: q_b, kv_a and kv_b whole
    ROLE = "role"  # rotary, non-rotary and value parts apart (arXiv 2502.16982, figure 9)
    HEAD = "head"  # roles, and every head apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """MuonClip (arXiv 2507.20534, algorithm 1), or AdamW everywhere for comparison.

    Attributes:
      name: rule for the matrices.
      schedule: learning rate by step.
      weight_decay: decoupled, multiplied by the learning rate; acts on every parameter, norm gains
        too.
      momentum: of Muon's heavy ball.
      momentum_dtype: format in which that momentum is stored; AdamW's moments, which belong to
        embedding, head and norms, are float32 always.
      nesterov: whether Muon looks ahead by one momentum step.
      newton_schulz_steps: iterations.
      newton_schulz_preset: coefficients.
      newton_schulz_dtype: format of its products.
      matrix_granularity: what counts as one matrix.
      update_rms: root mean square of Muon's update before the learning rate, AdamW's typical one.
      adam_b1: decay of AdamW's first moment.
      adam_b2: decay of AdamW's second moment.
      adam_eps: added to the root of AdamW's second moment.
      offload_state: whether Muon's momentum, nearly all of the state, lies in the host's memory and
        visits the devices layer by layer; on a CPU that is the same memory. No step was compiled
        that needs less of the devices' memory with it (BUILD_NOTES.md).
      qk_clip_threshold: tau, the largest attention logit allowed; None never clips.
      max_grad_norm: global norm above which gradients are scaled down; None never scales.
      selection_bias_rate: u of the router's balancing rule (arXiv 2502.16982, section 3.3); None
        keeps the biases.
      balance_loss_weight: alpha of the sequence-wise balance loss; None leaves it out.
    """

    schedule: ScheduleConfig
    name: OptimizerName = OptimizerName.MUON_CLIP
    weight_decay: float = 0.1
    momentum: float = 0.95
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_preset: NewtonSchulzPreset = NewtonSchulzPreset.JORDAN
    newton_schulz_dtype: NewtonSchulzDtype = NewtonSchulzDtype.BFLOAT16
    matrix_granularity: MatrixGranularity = MatrixGranularity.ROLE
    update_rms: float = 0.2
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    offload_state: bool = False
    qk_clip_threshold: float | None = 100.0
    max_grad_norm: float | None = 1.0
    selection_bias_rate: float | None = 1e-3
    balance_loss_weight: float | None = None

    def __post_init__(self):
        check_fields(self, "optimizer")
        require_positive(
            self,
            "optimizer",
            "newton_schulz_steps",
            "update_rms",
            "adam_eps",
            "qk_clip_threshold",
            "max_grad_norm",
            "selection_bias_rate",
            "balance_loss_weight",
        )
        for name in ("momentum", "adam_b1", "adam_b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name} must be in [0, 1), got {value}")
        require(
            not self.offload_state or self.name is OptimizerName.MUON_CLIP,
            "optimizer.offload_state moves Muon's momentum, and optimizer.name is 'adamw'; turn it "
            "off, or choose 'muon_clip' in optimizer.name",
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
