"""How many threads compute: one per physical core, shared among the ranks of a machine."""

from __future__ import annotations

import logging
import os

import psutil
import torch

from baichuan.errors import ConfigError
from baichuan.util.affinity import cores

logger = logging.getLogger(__name__)

MAX_THREADS = 1024


def use_threads(threads: int | None, ranks: int) -> None:
    """Let PyTorch and the CPU kernels use `threads` threads in this process, one of `ranks` on this machine.

    None stands for OMP_NUM_THREADS where it is set, else for this rank's share of the physical cores that the process
    may run on.  Raises ConfigError for less than one or more than MAX_THREADS.
    """
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads {threads} is not in 1 to {MAX_THREADS}; leave it out for every physical core")
    if threads is not None and threads > (there := cores()):
        logger.warning(
            "threads %d on %d cores take turns, which is much slower; leave it out, or give less", threads, there
        )
    torch.set_num_threads(threads or default_threads(ranks))


def default_threads(ranks: int) -> int:
    """This rank's share of the physical cores that the process may run on."""
    share = max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // ranks)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else share
    if ranks > 1 and allowed < share:
        logger.info(
            "this rank is bound to %d of the %d cores that are its share; mpirun --bind-to none gives it all",
            allowed,
            share,
        )
    return min(share, allowed)
