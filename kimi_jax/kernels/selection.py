"""Which program computes an operation."""

from collections.abc import Callable, Mapping
from typing import Any

from kimi_jax.configs.compute import Implementation
from kimi_jax.core.platform import target_platform

_PLATFORM = {Implementation.PALLAS_TPU: "tpu", Implementation.PALLAS_GPU: "gpu"}


def select(
    kernel: str,
    implementation: Implementation,
    available: Mapping[Implementation, Callable[..., Any]],
    fastest: Mapping[str, Implementation],
) -> Callable[..., Any]:
    """Returns the function that computes `kernel`.

    Args:
      kernel: the operation's name, for the message.
      implementation: AUTO takes the fastest for the platform; any other runs or raises, so that a
        measurement never silently measures something else.
      available: the operation's implementations.
      fastest: by platform, what AUTO takes; XLA where the platform is not named.

    Raises:
      NotImplementedError: the named implementation does not exist for this operation, or does not
        run on the platform.
    """
    chosen = implementation
    if implementation is Implementation.AUTO:
        chosen = fastest.get(target_platform(), Implementation.XLA)
    if chosen not in available:
        names = ", ".join(repr(option.value) for option in available)
        raise NotImplementedError(
            f"{kernel} has no implementation {chosen.value!r}; choose 'auto' or one of {names} in "
            "compute.implementation"
        )
    needed = _PLATFORM.get(chosen, target_platform())
    if needed != target_platform():
        raise NotImplementedError(
            f"{kernel}: {chosen.value!r} runs on a {needed.upper()}, and this program is for a "
            f"{target_platform().upper()}; choose 'auto' in compute.implementation"
        )
    return available[chosen]
