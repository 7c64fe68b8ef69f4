"""For which kind of device a program is being traced."""

import jax


def target_platform() -> str:
    """Returns "cpu", "tpu" or "gpu": the current mesh's devices, or else JAX's default ones.

    Differs from JAX's default where a program is compiled for devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
