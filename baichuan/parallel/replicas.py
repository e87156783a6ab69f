"""Several replicas of an engine in one world of ranks: which ranks form one, and how the others' leaders ask rank 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from baichuan.errors import ConfigError, counted
from baichuan.parallel.comm import Communicator, Mpi, Solo

POLL_S = 1e-3  # between two looks for a message: MPI's own waiting would take a core
END = "end"  # an asker's last message


def groups_of(machines: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The ranks of each replica, side by side on one machine, rank 0's first.

    machines: the ranks of each machine.  Raises ConfigError unless every machine has a multiple of `size` ranks.
    """
    for number, ranks in enumerate(machines):
        if len(ranks) % size:
            of_one, there, how = " of one machine", " on every machine", f"mpirun's hostfile: slots={size}"
            if len(machines) == 1:
                of_one, there, how = "", "", f"mpirun -n {size}, for example"
            raise ConfigError(
                f"machine {number} runs {counted(len(ranks), 'rank')} and each replica of the engine takes "
                f"{size}{of_one}; start a multiple of {size}{there} ({how})"
            )
    return [list(ranks[start : start + size]) for ranks in machines for start in range(0, len(ranks), size)]


@dataclass(frozen=True)
class Replica:
    """This rank's replica."""

    comm: Communicator  # joins the replica's ranks, of which the first leads
    count: int  # replicas in the world
    messages: Any = None  # an mpi4py communicator of the whole world, for ask and answered; None where count is 1


def join_replica(world: Communicator, size: int) -> Replica:
    """The replica of `size` ranks that this rank belongs to.  Every rank of the world calls it.

    Raises ConfigError where the world's ranks cannot be divided into replicas.
    """
    if not isinstance(world, Mpi) or world.world_size == size:
        return Replica(world, 1)
    groups = groups_of(world.machines, size)
    number = next(index for index, ranks in enumerate(groups) if world.rank in ranks)
    messages, split = world.mpi.Dup(), world.mpi.Split(number, world.rank)
    if size == 1:  # nothing is to be summed
        return Replica(Solo(world.local_rank, world.local_size), len(groups), messages)
    return Replica(Mpi(split, world.local_rank, world.local_size), len(groups), messages)


class Asker:
    """Puts questions to rank 0, on the leader of every other replica."""

    def __init__(self, messages: Any):
        self._messages, self._asked = messages, False

    def ask(self, question: Any, wait: bool) -> Any | None:
        """The answer to this question, or to the one before that has not been answered; None where none is there yet.

        wait: until an answer is there.
        """
        if not self._asked:
            self._messages.send(question, dest=0)
            self._asked = True
        while not self._messages.iprobe(source=0):
            if not wait:
                return None
            time.sleep(POLL_S)
        self._asked = False
        return self._messages.recv(source=0)

    def tell(self, news: Any) -> None:
        """Send what gets no answer."""
        self._messages.send(news, dest=0)


@contextmanager
def answered(messages: Any, askers: int, answer: Callable[[Any], Any]) -> Iterator[None]:
    """On rank 0: a thread answers messages while the block runs, and afterwards until every asker has sent END.

    answer: None = the message gets no answer.  What it raises is raised here at the end; askers then wait in vain.
    """
    failures: list[BaseException] = []
    thread = threading.Thread(target=_answer, args=(messages, askers, answer, failures), daemon=True)
    thread.start()
    yield
    while thread.is_alive():
        thread.join(POLL_S)
    if failures:
        raise failures[0]


def _answer(messages: Any, askers: int, answer: Callable[[Any], Any], failures: list[BaseException]) -> None:
    from mpi4py import MPI

    status = MPI.Status()
    try:
        while askers:
            if not messages.iprobe(status=status):
                time.sleep(POLL_S)
                continue
            message = messages.recv(source=status.Get_source())
            if message == END:
                askers -= 1
            elif (said := answer(message)) is not None:
                messages.send(said, dest=status.Get_source())
    except BaseException as error:
        failures.append(error)
