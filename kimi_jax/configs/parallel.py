"""How the work is laid over devices."""

import dataclasses

from kimi_jax.configs.checks import check_fields, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes.

    Attributes:
      data: devices along which the batch and every weight are split (FSDP); None takes all that the
        expert axis leaves.
      expert: devices along which the routed experts, the batch and the dense weights are split;
        None takes the largest d that divides both the number of devices and of experts with d*d <=
        2 * devices.
      simulated_devices: how many devices to simulate where there is no accelerator; without effect
        on a machine that has one.
    """

    data: int | None = None
    expert: int | None = None
    simulated_devices: int = 1

    def __post_init__(self):
        check_fields(self, "parallel")
        require_positive(self, "parallel", "data", "expert", "simulated_devices")
