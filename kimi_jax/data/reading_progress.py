"""A progress line on the terminal for work that takes seconds."""

from collections.abc import Iterable, Iterator

from kimi_jax.core.byte_progress import byte_progress
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
    done = 0
    with byte_progress(description, total_bytes, transient=True) as progress:
        for document in documents:
            yield document
            done += document.num_bytes
            progress(done)
