"""The device mesh: which devices there are, and how they are arranged along the mesh axes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core.errors import require
from kimi_jax.core.host_memory import keep_freed_memory

DATA = "data"  # batch, and every weight (FSDP)
EXPERT = "expert"  # routed experts, batch, and dense weights
MESH_AXES = (DATA, EXPERT)


def simulate_devices(count: int) -> None:
    """Splits the CPU into `count` devices; must run before the first array is made.

    Also lets the process keep the memory that programs on these devices free. Accelerators are not
    affected: where JAX finds one, it is used.
    """
    keep_freed_memory(one_heap=count == 1)
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(
    config: ParallelConfig, num_routed_experts: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arranges devices as data x expert, with Explicit axis types.

    Args:
      config: sizes of the axes; None is filled in from the number of devices.
      num_routed_experts: E, which the expert axis must divide.
      devices: those to use, default all of JAX's.

    Returns:
      The mesh, for `jax.set_mesh`.

    Raises:
      ConfigError: there are too few devices, or an axis does not divide what it splits.
    """
    devices = list(jax.devices() if devices is None else devices)
    expert = config.expert or _fitting_expert_axis(
        len(devices) // (config.data or 1), config, num_routed_experts
    )
    data = config.data or max(1, len(devices) // expert)
    require(
        data * expert <= len(devices),
        f"the mesh data {data} x expert {expert} needs {data * expert} devices and there are "
        f"{len(devices)} ({devices[0].platform}); lower parallel.data or parallel.expert, or, on a "
        f"CPU, raise parallel.simulated_devices to {data * expert}",
    )
    require(
        num_routed_experts % expert == 0,
        f"parallel.expert ({expert}) must divide model.num_routed_experts ({num_routed_experts})",
    )
    return jax.make_mesh(
        (data, expert),
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(MESH_AXES),
        devices=devices[: data * expert],
    )


def check_batch(mesh: Mesh, batch_sequences: int, accumulation_steps: int) -> None:
    """Raises `ConfigError` unless every micro-batch splits evenly over the mesh."""
    shards = math.prod(mesh.shape.values())
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    require(
        batch_sequences % (shards * accumulation_steps) == 0,
        f"a batch of {batch_sequences} sequences in {accumulation_steps} micro-batches cannot be "
        f"split over {shards} shards ({shape}); choose a multiple of "
        f"{shards * accumulation_steps} in training.batch_sequences",
    )


def _fitting_expert_axis(available: int, config: ParallelConfig, num_routed_experts: int) -> int:
    if config.data is not None:
        return math.gcd(max(1, available), num_routed_experts)
    common = math.gcd(available, num_routed_experts)
    return max(
        d for d in range(1, common + 1) if common % d == 0 and (d == 1 or d * d <= 2 * available)
    )
