"""Whether there is room for what is about to be written."""

import os
import pathlib
import shutil

from kimi_jax.core.errors import CheckpointFileError


def check_room(path: str | os.PathLike, num_bytes: int, *, freed: int = 0) -> None:
    """Raises `CheckpointFileError` where bytes do not fit on the disk of a file or folder.

    Args:
      path: of what is written; its folder exists.
      num_bytes: to be written still.
      freed: bytes that are given back first.
    """
    free = shutil.disk_usage(pathlib.Path(path).parent).free + freed
    if num_bytes > free:
        raise CheckpointFileError(
            f"{path}: {num_bytes / 1e9:.1f} GB are still to be written, and {free / 1e9:.1f} GB "
            "are free; make room, or name an output on another disk"
        )
