"""A progress bar of bytes, with their rate and the time left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar while a block runs, where there is a terminal.

    Args:
      description: what is being done.
      total_bytes: of all of it.

    Yields:
      What to call with the number of bytes done so far; any thread may.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task(description, total=total_bytes)
        yield lambda num_bytes: display.update(task, completed=num_bytes)
