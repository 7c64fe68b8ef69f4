"""The device mesh: which devices there are, and how they are arranged along the mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from kimi_jax.configs.parallel import ParallelConfig
from kimi_jax.core.errors import require
from kimi_jax.core.host_memory import keep_freed_memory

REPLICA = "replica"  # batch alone; all weights are copied
PIPE = "pipe"  # layers, one after the other, and the batch; outside its stages, weights too
DATA = "data"  # batch, and every weight (FSDP)
EXPERT = "expert"  # routed experts, batch, and dense weights
CONTEXT = "context"  # positions; in attention heads instead; and weights
TENSOR = "tensor"  # heads, inner widths, vocabulary
# The slowest first: neighbours along the last axes are neighbours in the network.
MESH_AXES = (REPLICA, PIPE, DATA, EXPERT, CONTEXT, TENSOR)
SEQUENCE_AXES = (REPLICA, PIPE, DATA, EXPERT)  # what splits the sequences of a batch
_MAY_CROSS_SLICES = (REPLICA, PIPE, DATA, EXPERT)


def simulate_devices(count: int) -> None:
    """Splits the CPU into `count` devices; must run before the first array is made.

    Also lets the process keep the memory that programs on these devices free. Accelerators are not
    affected: where JAX finds one, it is used.
    """
    keep_freed_memory(one_heap=count == 1)
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(
    config: ParallelConfig, num_routed_experts: int, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arranges devices along `MESH_AXES`, with Explicit axis types.

    Args:
      config: sizes of the axes; None is filled in from the number of devices.
      num_routed_experts: E, which the expert axis must divide.
      devices: those to use, default all of JAX's.

    Returns:
      The mesh, for `jax.set_mesh`.

    Raises:
      ConfigError: there are too few devices, an axis does not divide what it splits, or one that
        should stay within a slice would not.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _axis_sizes(config, num_routed_experts, len(devices))
    count = math.prod(sizes.values())
    require(
        count <= len(devices),
        f"the mesh {_describe(sizes)} needs {count} devices and there are {len(devices)} "
        f"({devices[0].platform}); lower one of these axes in parallel, or, on a CPU, raise "
        f"parallel.simulated_devices to {count}",
    )
    require(
        num_routed_experts % sizes[EXPERT] == 0,
        f"parallel.expert ({sizes[EXPERT]}) must divide model.num_routed_experts "
        f"({num_routed_experts})",
    )
    arranged = arrange_devices(devices[:count], sizes, cross_slices=config.cross_slices)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def arrange_devices(
    devices: Sequence[Any], sizes: Mapping[str, int], *, cross_slices: bool
) -> np.ndarray:
    """Places devices so that axes of much traffic run along fast links.

    On TPUs the axes are laid along those of the physical torus, and slices along the replica and
    pipe axes. Devices of other platforms are taken in their own order, which goes host by host.

    Args:
      devices: as many as the mesh has.
      sizes: of the mesh axes, in their order.
      cross_slices: whether the data and expert axes may take what slices those two leave.

    Returns:
      An array of devices with one dimension for each axis.

    Raises:
      ConfigError: slices cannot be laid along the axes that may cross them.
    """
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return np.array(devices, dtype=object).reshape(shape)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = _slices_along_axes(sizes, num_slices, cross_slices=cross_slices)
    within = tuple(size // across[name] for name, size in sizes.items())
    return mesh_utils.create_hybrid_device_mesh(
        within, tuple(across.values()), devices, allow_split_physical_axes=True
    )


def check_batch(mesh: Mesh, batch_sequences: int, accumulation_steps: int) -> None:
    """Raises `ConfigError` unless every micro-batch splits evenly over the mesh."""
    shards = sequence_shards(mesh)
    shape = _describe({name: mesh.shape[name] for name in SEQUENCE_AXES})
    require(
        batch_sequences % (shards * accumulation_steps) == 0,
        f"a batch of {batch_sequences} sequences in {accumulation_steps} micro-batches cannot be "
        f"split over {shards} shards ({shape}); choose a multiple of "
        f"{shards * accumulation_steps} in training.batch_sequences",
    )


def sequence_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits the sequences of a batch."""
    return math.prod(mesh.shape[name] for name in SEQUENCE_AXES)


def position_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits the positions of a sequence."""
    return mesh.shape[CONTEXT]


def describe(mesh: Mesh) -> str:
    """Names axes and sizes, such as "data 2 x expert 4"; others of size 1 are left out."""
    return _describe(mesh.shape)


def _describe(sizes: Mapping[str, int]) -> str:
    shown = {n: size for n, size in sizes.items() if size > 1 or n in (DATA, EXPERT)}
    return " x ".join(f"{name} {size}" for name, size in shown.items())


def _axis_sizes(
    config: ParallelConfig, num_routed_experts: int, num_devices: int
) -> dict[str, int]:
    """Fills in the axes that the configuration leaves open; in the order of `MESH_AXES`."""
    others = config.pipe * config.replica * config.context * config.tensor
    available = num_devices // others
    expert = config.expert or _fitting_expert_axis(
        available // (config.data or 1), config, num_routed_experts
    )
    data = config.data or max(1, available // expert)
    sizes = (config.replica, config.pipe, data, expert, config.context, config.tensor)
    return dict(zip(MESH_AXES, sizes, strict=True))


def _fitting_expert_axis(available: int, config: ParallelConfig, num_routed_experts: int) -> int:
    if config.data is not None:
        return math.gcd(max(1, available), num_routed_experts)
    common = math.gcd(max(1, available), num_routed_experts)
    return max(
        d for d in range(1, common + 1) if common % d == 0 and (d == 1 or d * d <= 2 * available)
    )


def _slices_along_axes(
    sizes: Mapping[str, int], num_slices: int, *, cross_slices: bool
) -> dict[str, int]:
    """Says how many slices each axis crosses."""
    require(
        cross_slices or sizes[PIPE] * sizes[REPLICA] % num_slices == 0,
        f"parallel.pipe * parallel.replica ({sizes[PIPE] * sizes[REPLICA]}) must be a multiple of "
        f"the {num_slices} slices, so that only their exchanges cross the network between them; or "
        "let the data and expert axes cross it, too, by parallel.cross_slices",
    )
    left = num_slices
    across = dict.fromkeys(sizes, 1)
    for name in _MAY_CROSS_SLICES:
        across[name] = math.gcd(left, sizes[name])
        left //= across[name]
    require(
        left == 1,
        f"{num_slices} slices cannot be laid along {_describe(sizes)}: parallel.pipe * "
        "parallel.replica * parallel.data * parallel.expert must be a multiple of them",
    )
    return across
