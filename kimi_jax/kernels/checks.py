"""Checks on the operands of a kernel, made while tracing."""

from collections.abc import Mapping

from kimi_jax.quantization.fake_quant import FakeQuantized, Weight
from kimi_jax.quantization.int4 import Int4Weight


def check_shapes(kernel: str, operands: Mapping[str, tuple[Weight, str]]) -> None:
    """Raises `ValueError` unless dimensions of one letter have one size in all operands.

    Args:
      kernel: the operation's name, for the message.
      operands: name -> (array, its dimensions, such as "B T N H").
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, dimensions) in operands.items():
        letters = dimensions.split()
        if array.ndim != len(letters):
            raise ValueError(f"{kernel}: {name} must be [{dimensions}], got shape {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            expected, first = sizes.setdefault(letter, (size, name))
            if size != expected:
                raise ValueError(
                    f"{kernel}: {name} must be [{dimensions}] with {letter} = {expected} as in "
                    f"{first}, got shape {array.shape}"
                )


def check_same_dtype(kernel: str, operands: Mapping[str, Weight]) -> None:
    """Raises `ValueError` unless all operands have one dtype; packed weights have none."""
    dtypes = {
        name: str((operand.carrier if isinstance(operand, FakeQuantized) else operand).dtype)
        for name, operand in operands.items()
        if not isinstance(operand, Int4Weight)
    }
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{kernel}: operands must have one dtype, got {dtypes}; cast them before")
