"""Pages: memory that a process has been given once stays with it."""

from __future__ import annotations

import ctypes

MMAP_MAX, TRIM_THRESHOLD = -4, -1


def keep() -> bool:
    """Let malloc hold what is freed for the next call; True where the C library does so (glibc).

    By default large tensors go back to the system and come anew, a page fault for every 4 KiB, in every block of a
    network: 128,000 faults a forward of 2,048 tokens through 30 blocks of width 576, 7 % of its time on the machine it was
    measured on. What the process holds stays at its peak until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
