"""How the ranks of one engine talk: not at all, as threads of one process, or by MPI."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

LEAVE_TIMEOUT_S = 5.0


class Communicator(Protocol):
    rank: int
    world_size: int
    capturable: bool  # whether a CUDA graph can hold its collectives

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, added in rank order in float32 and rounded once: the same bits on each rank."""

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks."""

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors side by side along the last dimension, in rank order."""

    def gather_objects(self, value: Any) -> list:
        """Every rank's value, in rank order, on every rank."""

    def leave_failed(self) -> None:
        """Called by a rank that is about to exit with an error.  Returns when every rank does so; ends all of them
        with exit code 2 when the others are still at work after LEAVE_TIMEOUT_S."""


class Solo:
    """A world of one rank."""

    rank = 0
    world_size = 1
    capturable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    all_reduce_max = all_gather = all_reduce

    def gather_objects(self, value: Any) -> list:
        return [value]

    def leave_failed(self) -> None:
        pass


class _Gathering:
    """The collectives, from one way of collecting every rank's tensor in rank order, in host memory."""

    capturable = False

    def _gather(self, x: Tensor) -> Tensor:  # [world_size, *x.shape]
        raise NotImplementedError

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._gather(x).sum(0, dtype=torch.float32).to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._gather(x).amax(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._gather(x).unbind(0), dim=-1)


class Threads(_Gathering):
    """One rank of several threads of this process; for self-checks and tests.  Made by run_ranks."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier):
        self.rank, self.world_size = rank, len(board)
        self._board, self._barrier = board, barrier

    def gather_objects(self, value: Any) -> list:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()  # nobody writes the next value before everybody has read
        return values

    def _gather(self, x: Tensor) -> Tensor:
        return torch.stack(self.gather_objects(x))

    def leave_failed(self) -> None:
        self._barrier.abort()


def run_ranks(world_size: int, body: Callable[[Communicator], Any]) -> list:
    """body's results on each of world_size ranks, run as threads.  A rank's exception ends all and is raised here."""
    board, barrier = [None] * world_size, threading.Barrier(world_size)

    def run(rank: int) -> Any:
        comm = Threads(rank, board, barrier)
        try:
            return body(comm)
        except BaseException:
            comm.leave_failed()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    errors = [future.exception() for future in futures if future.exception()]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the first cause, not the barrier that it broke
    return [future.result() for future in futures]


class Mpi(_Gathering):
    """The ranks that mpirun started, exchanging host memory."""

    def __init__(self):
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.world_size = self._comm.Get_size()

    def _gather(self, x: Tensor) -> Tensor:  # [world_size, *x.shape]
        x = x.contiguous()
        gathered = torch.empty(self.world_size, *x.shape, dtype=x.dtype)
        self._comm.Allgather(_as_bytes(x), _as_bytes(gathered))
        return gathered

    def gather_objects(self, value: Any) -> list:
        return self._comm.allgather(value)

    def leave_failed(self) -> None:
        request, deadline = self._comm.Ibarrier(), time.monotonic() + LEAVE_TIMEOUT_S
        while not request.Test():
            if time.monotonic() > deadline:
                self._comm.Abort(2)
            time.sleep(0.05)


def _as_bytes(x: Tensor):
    return x.view(-1).view(torch.uint8).numpy()


def world_of_this_process() -> Communicator:
    """MPI when mpirun (or another launcher) started several processes, else a world of one."""
    sizes = (os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    return Mpi() if any(size != "1" for size in sizes) else Solo()
