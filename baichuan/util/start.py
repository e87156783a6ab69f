"""A process's start: when it was, and how its imports take less time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def seconds_since_start() -> float:
    """Wall time since this process was started, imports included."""
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    started = int(fields[19])  # in ticks since boot, as uptime
    return float(Path("/proc/uptime").read_text().split()[0]) - started / os.sysconf("SC_CLK_TCK")


@contextmanager
def without_collections() -> Iterator[None]:
    """Put garbage collection off, and leave what is there at the end out of every later one.

    PyTorch's import makes 150,000 objects that stay: looking for garbage among them takes a sixth of its time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
