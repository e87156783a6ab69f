"""Freed memory is kept for the next activations: getting new pages from the system takes a tenth of a prompt's time."""

from __future__ import annotations

import ctypes

# https://man7.org/linux/man-pages/man3/mallopt.3.html
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20  # unused bytes at the end of the heap that are kept
LARGEST_BYTES = 32 << 20  # largest tensor whose memory is kept; glibc allows no more


def keep_freed_memory() -> None:
    """Let this process keep up to KEPT_BYTES that it has freed.  Other C libraries than glibc go on as they do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
