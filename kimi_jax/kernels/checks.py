"""Checks on the operands of a kernel, made while tracing."""

from collections.abc import Mapping

from jaxtyping import Array


def check_shapes(kernel: str, operands: Mapping[str, tuple[Array, str]]) -> None:
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


def check_same_dtype(kernel: str, operands: Mapping[str, Array]) -> None:
    """Raises `ValueError` unless all operands have one dtype."""
    dtypes = {name: str(array.dtype) for name, array in operands.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{kernel}: operands must have one dtype, got {dtypes}; cast them before")
