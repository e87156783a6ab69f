"""Tasks distributed over worker processes, which end with this process however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from baichuan.errors import UnsupportedError
from baichuan.util.signals import ignored

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks


def run_tasks(
    tasks: Mapping[Any, Callable[[], Any]], processes: int, remedy: str, prepare: Callable[[], None] | None = None
) -> Iterator[tuple[Any, Any]]:
    """(key, result) of each task as it is finished; in this process where one is enough.

    prepare is called first in each worker process, if there are any; it and the tasks must be picklable.
    Raises UnsupportedError, ending in `remedy`, when a process was killed.
    """
    if processes == 1:
        yield from ((key, task()) for key, task in tasks.items())
        return
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, CONTEXT, _prepare, (os.getpid(), prepare)) as pool:
        with ignored(signal.SIGINT, signal.SIGHUP):  # inherited: the whole group gets them, and workers are ended here
            futures: dict[Future, Any] = {pool.submit(task): key for key, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UnsupportedError(
                f"one of {processes} processes was killed, most likely for lack of memory; {remedy}"
            ) from None
        except BaseException:  # Ctrl-C, a failed task, a caller that gave up: nobody waits for the other tasks
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(parent: int, prepare: Callable[[], None] | None) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # killed however the parent dies
    if os.getppid() != parent:  # the parent has died already
        os._exit(1)
    torch.set_num_threads(1)  # the processes share the cores
    if prepare:
        prepare()
