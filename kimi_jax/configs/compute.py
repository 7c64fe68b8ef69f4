"""How the model is computed: speed, memory and rounding, never the mathematics."""

import dataclasses
import enum

from kimi_jax.configs.checks import check_fields, require_positive
from kimi_jax.core.errors import require


class ComputeDtype(enum.Enum):
    """Format of activations and matrix products."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Remat(enum.Enum):
    """What the backward pass recomputes, layer by layer."""

    NONE = "none"  # nothing: every intermediate value is kept
    K2 = "k2"  # norms, SwiGLU and MLA up-projections (arXiv 2507.20534, section 2.4)
    FULL = "full"  # everything but the layer's input


class ResidualFormat(enum.Enum):
    """Format of what feed-forward layers and experts keep for their backward pass."""

    COMPUTE = "compute"  # that of all activations
    FP8 = "fp8"  # E4M3 codes, a float32 scale for every 128 (arXiv 2507.20534, section 2.4)


class Implementation(enum.Enum):
    """Which kernels compute attention and the experts."""

    AUTO = "auto"  # the fastest for the platform
    XLA = "xla"  # plain XLA, shaped for CPUs
    XLA_ACCELERATOR = "xla_accelerator"  # plain XLA, in products as large as TPUs and GPUs like
    PALLAS_TPU = "pallas_tpu"  # this project's own kernels for TPUs
    PALLAS_GPU = "pallas_gpu"  # and for GPUs of Hopper's generation
    REFERENCE = "reference"  # the shortest correct program; slow, for tests


class Exchange(enum.Enum):
    """How tokens reach the devices of their experts."""

    AUTO = "auto"  # gather on a CPU, ragged elsewhere
    GATHER = "gather"  # every device sees all tokens of the expert axis
    PADDED = "padded"  # all-to-all in equal parts
    RAGGED = "ragged"  # all-to-all in parts of their true sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Formats, kernels and memory.

    Attributes:
      dtype: format of activations and matrix products; master weights are float32 always.
      remat: what the backward pass recomputes.
      feed_forward_residuals: format in which the inputs of SwiGLU and of the experts wait for the
        backward pass. FP8 changes no result of the forward pass; gradients are those of the rounded
        values.
      offload_activations: whether what is kept for the backward pass of a layer, its input
        included, waits in the host's memory; on a CPU that is the same memory.
      implementation: which kernels run; a named one runs or raises.
      logits_chunk_tokens: tokens a device turns into logits at a time, so that memory never holds
        all of them; None keeps them together.
      exchange: how tokens reach the devices of their experts.
      exchange_capacity: room for tokens sent to experts, as a multiple of an even load; tokens that
        find none are dropped and counted (`experts/dropped`). None has room for the worst case.
        On a CPU, where `auto` gathers, nothing is dropped anyway.
    """

    dtype: ComputeDtype = ComputeDtype.BFLOAT16
    remat: Remat = Remat.NONE
    feed_forward_residuals: ResidualFormat = ResidualFormat.COMPUTE
    offload_activations: bool = False
    implementation: Implementation = Implementation.AUTO
    logits_chunk_tokens: int | None = None
    exchange: Exchange = Exchange.AUTO
    exchange_capacity: float | None = None

    def __post_init__(self):
        check_fields(self, "compute")
        require_positive(self, "compute", "logits_chunk_tokens", "exchange_capacity")
        require(
            self.feed_forward_residuals is ResidualFormat.COMPUTE or self.remat is not Remat.FULL,
            f"compute.feed_forward_residuals {self.feed_forward_residuals.value!r} is a format of "
            "what feed-forward layers keep for the backward pass, and with compute.remat 'full' "
            "they keep nothing; choose 'k2' or 'none' in compute.remat, or leave the format out",
        )
        require(
            not (self.offload_activations and self.remat is Remat.NONE),
            "compute.offload_activations moves what compute.remat keeps, and with 'none' that is "
            "every intermediate value; choose 'k2' or 'full' in compute.remat",
        )
        require(
            self.exchange is not Exchange.GATHER or self.exchange_capacity is None,
            f"compute.exchange_capacity ({self.exchange_capacity}) has no meaning for "
            "compute.exchange 'gather', which never drops; leave it out, or choose 'ragged' or "
            "'padded'",
        )
