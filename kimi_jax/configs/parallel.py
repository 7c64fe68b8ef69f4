"""How the work is laid over devices."""

import dataclasses

from kimi_jax.configs.checks import check_fields, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes.

    Attributes:
      pipe: stages that the mixture blocks run through, one after the other, each with its share of
        the layers; it must divide their number. Every other weight and the batch are split along
        it. Its devices exchange activations after each of those blocks, the blocks' weights and
        gradients once a step, and parts of all other weights every micro-batch; it, too, may lie
        across slices.
      replica: copies of everything: only the batch is split along this axis. Its devices need few
        exchanges, so that it may lie across slices, over the data-centre network.
      data: devices along which the batch and every weight are split (FSDP); None takes all that the
        other axes leave.
      expert: devices along which the routed experts, the batch and the dense weights are split;
        None takes the largest d that divides both the number of devices and of experts with d*d <=
        2 * devices.
      context: devices along which the positions of a sequence are split, and in attention the
        heads.
      tensor: devices along which the heads, the inner widths of feed-forward layers and the
        vocabulary are split.
      cross_slices: whether the data and expert axes may lie across slices, where pipe and replica
        do not cover them; their exchanges are large, and that network is slow.
      simulated_devices: how many devices to simulate where there is no accelerator; without effect
        on a machine that has one.
    """

    pipe: int = 1
    replica: int = 1
    data: int | None = None
    expert: int | None = None
    context: int = 1
    tensor: int = 1
    cross_slices: bool = False
    simulated_devices: int = 1

    def __post_init__(self):
        check_fields(self, "parallel")
        require_positive(
            self,
            "parallel",
            "pipe",
            "replica",
            "data",
            "expert",
            "context",
            "tensor",
            "simulated_devices",
        )
