"""For which kind of device a program is being traced."""

import jax

# What JAX calls the chips whose kernels are tuned.
_CHIPS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def target_platform() -> str:
    """Returns "cpu", "tpu" or "gpu": the current mesh's devices, or else JAX's default ones.

    Differs from JAX's default where a program is compiled for devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_chip() -> str | None:
    """Returns the chip a program is traced for by the name of its table of tiles, or None.

    Differs from JAX's default device as `target_platform` does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return _CHIPS.get(kind)
