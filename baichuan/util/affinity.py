"""The cores that this process may run on."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil


def cores() -> int:
    """How many this process may run on, each thread of a core counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave_single_core(ranks: int) -> bool:
    """Let this process, one of `ranks` on this machine, run on every core where it is bound to one and its share is
    more.  Returns whether it was bound.

    Open MPI binds the ranks of `mpirun -n 2` to a core each.  Opening an engine takes many threads, and so does
    computing on the CPU: on one core both take several times as long.
    """
    every = os.cpu_count() or 1
    per_core = every // (psutil.cpu_count(logical=False) or every)
    if ranks == 1 or cores() > per_core or every // ranks <= per_core:
        return False
    with suppress(OSError):
        os.sched_setaffinity(0, range(every))
    return cores() > per_core
