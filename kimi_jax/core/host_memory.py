"""How the process holds the memory of the CPU it runs on."""

import ctypes

# Options of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4
_ARENA_MAX = -8
_SETTINGS = {
    _MMAP_MAX: 0,  # large blocks come from heaps,
    _TRIM_THRESHOLD: 2**31 - 1,  # whose end is not given back,
    _TOP_PAD: 2**26,  # and which grow in large steps
}


def keep_freed_memory(*, one_heap: bool) -> bool:
    """Lets freed memory be used again instead of returning it to the operating system.

    XLA on CPUs allocates the temporary buffers of a program each time it runs. glibc maps blocks of
    this size anew, and the first touch of each of their pages is a fault: a third of a training
    step in virtual machines, where faults are slow. Call before the first array is made: threads
    keep the heap they have. The process keeps its peak of memory until it ends.

    Args:
      one_heap: lets all threads share the first heap, the only one that can hold blocks above 64
        MB. A process with one CPU device needs that; the threads of several devices have smaller
        blocks, and would spend their time in looking for room in one heap.

    Returns:
      Whether the C library has these settings; only glibc does, and elsewhere nothing changes.

    Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no such library, or one without the function
        return False
    settings = _SETTINGS | ({_ARENA_MAX: 1} if one_heap else {})
    return all(mallopt(option, value) for option, value in settings.items())
