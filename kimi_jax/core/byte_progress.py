"""A progress bar of bytes, with their rate and the time left."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(
    description: str, total_bytes: int | None, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Shows a bar while a block runs, where standard error is a terminal.

    Args:
      description: what is being done.
      total_bytes: of all of it; None where that is not known.
      transient: whether the bar goes when the block ends.

    Yields:
      What to call with the number of bytes done so far; any thread may.
    """
    from rich import console, progress

    terminal = console.Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=terminal, transient=transient, disable=not terminal.is_terminal
    ) as display:
        task = display.add_task(description, total=total_bytes)
        yield lambda num_bytes: display.update(task, completed=num_bytes)
