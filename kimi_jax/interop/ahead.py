"""Work that goes on in threads while its earlier results are written, in order."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any

THREADS = 2  # that read and convert
AHEAD = 4  # results that wait


def in_order(
    work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (task, work(*task)) for each task.

    At most THREADS + AHEAD results exist beside the one that was yielded. Whoever stops early
    closes the iterator, so that nothing goes on behind it.
    """
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, *task)))
                if len(waiting) == THREADS + AHEAD:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _first(waiting: collections.deque) -> tuple[tuple[Any, ...], Any]:
    task, future = waiting.popleft()
    return task, future.result()
