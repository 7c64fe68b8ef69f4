"""How the model is computed: speed, memory and rounding, never the mathematics."""

import dataclasses
import enum

from kimi_jax.configs.checks import check_fields, require_positive


class ComputeDtype(enum.Enum):
    """Format of activations and matrix products."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Remat(enum.Enum):
    """What the backward pass recomputes, layer by layer."""

    NONE = "none"  # nothing: every intermediate value is kept
    K2 = "k2"  # all but the latents (after arXiv 2507.20534, section 2.4, which keeps more)
    FULL = "full"  # everything but the layer's input


class Implementation(enum.Enum):
    """Which kernels compute attention and the experts."""

    AUTO = "auto"  # the fastest for the platform
    XLA = "xla"  # plain XLA, everywhere
    REFERENCE = "reference"  # the shortest correct program; slow, for tests


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Formats, kernels and memory.

    Attributes:
      dtype: format of activations and matrix products; master weights are float32 always.
      remat: what the backward pass recomputes.
      implementation: which kernels run; a named one runs or raises.
      logits_chunk_tokens: tokens a device turns into logits at a time, so that memory never holds
        all of them; None keeps them together.
    """

    dtype: ComputeDtype = ComputeDtype.BFLOAT16
    remat: Remat = Remat.NONE
    implementation: Implementation = Implementation.AUTO
    logits_chunk_tokens: int | None = None

    def __post_init__(self):
        check_fields(self, "compute")
        require_positive(self, "compute", "logits_chunk_tokens")
