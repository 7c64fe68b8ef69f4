"""Arrays that wait in the memory of the host until a device needs them."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.core.errors import require

HOST_MEMORY_KIND = "pinned_host"  # JAX's name of host memory that a device can read by itself


def check_host_memory(mesh: Mesh, option: str) -> None:
    """Raises `ConfigError` unless the devices of `mesh` can reach the memory of their host."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    require(
        HOST_MEMORY_KIND in kinds,
        f"{option} needs devices that reach {HOST_MEMORY_KIND} memory, and those of "
        f"{device.platform} ({device.device_kind}) reach {', '.join(kinds)} only; turn {option} "
        "off, or run on a TPU, a GPU or a CPU",
    )


def to_host(tree: Any) -> Any:
    """Copies every array but scalars to host memory, in its layout, inside `jax.jit`.

    Scalars stay: they are read without waiting, and save nothing. On a CPU, both memories are one.
    """
    return _move(tree, jax.memory.Space.Host)


def to_device(tree: Any) -> Any:
    """Undoes `to_host`."""
    return _move(tree, jax.memory.Space.Device)


def placed(aval: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Describes an array on a mesh, from its abstract value in a traced program.

    Args:
      aval: such as the `out_avals` of `jax.make_jaxpr` hold.
      mesh: the devices.

    Returns:
      Shape, dtype, and a sharding with the memory that the program leaves it in.
    """
    spec = aval.sharding.spec
    # As long as the shape, as the specs of results are.
    spec = PartitionSpec(*spec, *(None,) * (aval.ndim - len(spec)))
    in_host = aval.memory_space == jax.memory.Space.Host
    kind = HOST_MEMORY_KIND if in_host else None
    sharding = NamedSharding(mesh, spec, memory_kind=kind)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, tree)
