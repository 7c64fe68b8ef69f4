"""Sizes of tiles that were found best for a chip and a shape; data beside this module.

`tools/tune_kernels.py` writes the tables.
"""

import functools
import importlib.resources
import json
from typing import Any

from kimi_jax.core.platform import target_chip

ROWS = "rows"  # the one size that differs from call to call


def tiles(kernel: str, **shape: int) -> dict[str, int] | None:
    """Returns the tiles tabulated for the chip that a program is traced for.

    Args:
      kernel: the operation's name.
      **shape: sizes by name, as its cases name them. All must be tabulated exactly, but `rows`, for
        which the nearest tabulated number is taken.

    Returns:
      Sizes of tiles by name, or None where nothing is tabulated: the kernel then goes by a rule.
    """
    chip = target_chip()
    return None if chip is None else _nearest(table(chip), kernel, shape)


@functools.cache
def table(chip: str) -> tuple[dict[str, Any], ...]:
    """Returns the entries of a chip's table, none where there is no table."""
    file = importlib.resources.files("kimi_jax.kernels") / "tile_tables" / f"{chip}.json"
    return tuple(json.loads(file.read_text())) if file.is_file() else ()


def _nearest(
    entries: tuple[dict[str, Any], ...], kernel: str, shape: dict[str, int]
) -> dict[str, int] | None:
    fixed = {name: size for name, size in shape.items() if name != ROWS}
    fitting = [
        entry
        for entry in entries
        if entry["kernel"] == kernel
        and {name: size for name, size in entry["shape"].items() if name != ROWS} == fixed
    ]
    if not fitting:
        return None
    rows = shape.get(ROWS, 0)
    return min(fitting, key=lambda entry: abs(entry["shape"].get(ROWS, 0) - rows))["tiles"]
