"""Devices of accelerators that are not there, to compile for."""

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from kimi_jax.core.errors import ConfigError, require

TPU_KINDS = ("v5e", "v5p", "v6e", "tpu7x")
GPU_KINDS = ("h100", "h200")
GPUS_PER_NODE = 8

_FORMS = (
    "TPUs are named like v5p:8x8x8 (v5p, tpu7x: AxBxC; v5e, v6e: AxB; hosts have 2 x 2 chips, "
    "which must divide A and B), GPUs like h100:64 (or h200), with the number of GPUs"
)

# What the GPU compiler has to know of an H100 SXM5 80 GB: data sheet (132 SMs, 50 MB of L2 cache,
# 3.35 TB/s) and the limits of compute capability 9.0 in the CUDA C++ programming guide. The H200 is
# the same chip with more and faster memory.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": {"bandwidth": 3352320000000, "memory": 84929347584, "name": "NVIDIA H100 80GB HBM3"},
    "h200": {"bandwidth": 4800000000000, "memory": 150754820096, "name": "NVIDIA H200"},
}


def prepare_environment() -> None:
    """Makes the process compile for absent accelerators; call it before JAX is first used.

    The CPU is the platform. The TPU compiler neither asks a cloud for the machine's own TPUs nor
    takes the lock that lets one process only use it.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_STDERR_LOG_LEVEL"] = "3"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    jax.config.update("jax_platforms", "cpu")


def absent_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns the devices of a topology, which need not exist: programs can be compiled for them.

    Args:
      topology: kind and arrangement of one slice, such as v5p:8x8x8, or h100:64.
      num_slices: slices, or groups of GPUs, of that arrangement.

    Returns:
      Devices in the order of their numbers; those of TPUs have coordinates and, with several
      slices, a slice index.

    Raises:
      ConfigError: the name is unknown, the arrangement impossible, or the compiler not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind in TPU_KINDS:
        return _tpus(topology, num_slices)
    if kind in GPU_KINDS and shape.isdigit() and int(shape) > 0:
        return _gpus(kind, int(shape) * num_slices)
    raise ConfigError(f"topology {topology!r} is unknown; {_FORMS}")


def lowering_platform(device: Any) -> str:
    """Names a device's platform as `lower(lowering_platforms=...)` wants it."""
    return "cuda" if device.platform == "gpu" else device.platform


def compile_for(
    device: Any, fn: Callable[..., Any], *operands: Any, **keywords: Any
) -> jax.stages.Compiled:
    """Compiles `fn(*operands, **keywords)` for one device, which need not exist.

    While it is traced, `core.platform` sees that device.

    Args:
      device: from `absent_devices`.
      fn: a function of arrays.
      *operands: arrays, or anything with their shapes and formats.
      **keywords: the same, by name.
    """
    placed = jax.sharding.SingleDeviceSharding(device)
    operands, keywords = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), (operands, keywords)
    )
    described = jax.sharding.AbstractDevice(
        device_kind=device.device_kind,
        num_cores=getattr(device, "num_cores", None),
        platform=device.platform,
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(fn).trace(*operands, **keywords)
        lowered = traced.lower(lowering_platforms=(lowering_platform(device),))
    return lowered.compile()


def torus_dimensions(devices: Sequence[Any]) -> int:
    """Counts the dimensions of the chips' torus along which a group of TPUs is spread."""
    places = [tuple(device.coords) for device in devices]
    return sum(len(set(along)) > 1 for along in zip(*places, strict=True))


def spans_network(devices: Sequence[Any]) -> bool:
    """True if a group of devices must talk over the data-centre network: slices, or GPU nodes."""
    if devices[0].platform == "tpu":
        return len({getattr(device, "slice_index", 0) for device in devices}) > 1
    return len({device.id // GPUS_PER_NODE for device in devices}) > 1


def _tpus(topology: str, num_slices: int) -> list[jax.Device]:
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"compiling for {topology} needs libtpu, which is not installed: "
        "pip install -e '.[aot]' (no TPU is needed)",
    )
    require(
        re.fullmatch(r"\w+:\d+(x\d+)+", topology) is not None,
        f"topology {topology!r} has no arrangement; {_FORMS}",
    )
    options: dict[str, Any] = {} if num_slices == 1 else {"num_slices": num_slices}
    return _describe(topology, "tpu", options)


def _gpus(kind: str, count: int) -> list[jax.Device]:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    require(
        any(importlib.util.find_spec(plugin) is not None for plugin in plugins),
        f"compiling for {kind} needs JAX's CUDA plugin, which is not installed: "
        "pip install -e '.[aot-cuda]' (neither a GPU nor CUDA is needed)",
    )
    nodes = -(-count // GPUS_PER_NODE)
    in_node = min(count, GPUS_PER_NODE)
    require(
        nodes * in_node == count,
        f"{count} GPUs do not fill nodes of {GPUS_PER_NODE}; use fewer than that or a multiple",
    )
    arrangement = f"1x{nodes}x{in_node}"
    options = {"target_config": _HOPPER.format(**_GPUS[kind]), "topology": arrangement}
    return _describe(kind, "cuda", options)


def _describe(topology: str, platform: str, options: dict[str, Any]) -> list[jax.Device]:
    get = functools.partial(topologies.get_topology_desc, topology, platform, **options)
    try:
        return list(get().devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"topology {topology!r} is impossible: {reason[:200]}; {_FORMS}"
        ) from error
