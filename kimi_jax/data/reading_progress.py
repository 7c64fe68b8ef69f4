"""A progress line on the terminal for work that takes seconds."""

from collections.abc import Iterable, Iterator

from kimi_jax.data.documents import Document


def with_progress(
    documents: Iterable[Document], description: str, total_bytes: int | None = None
) -> Iterator[Document]:
    """Yields `documents`, showing on a terminal how many bytes of them have passed.

    Args:
      documents: what to pass on.
      description: what is being done.
      total_bytes: of all documents, where it is known.
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
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as display:
        task = display.add_task(description, total=total_bytes)
        for document in documents:
            yield document
            display.advance(task, document.num_bytes)
