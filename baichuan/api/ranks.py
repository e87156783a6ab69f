"""How the ranks of an engine serve together: rank 0 knows what is to be done, the others repeat its calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from baichuan.errors import BaichuanError, UnsupportedError
from baichuan.generation.requests import Progress, Request, Serving, Timing
from baichuan.parallel.comm import Communicator

T = TypeVar("T")


@dataclass(frozen=True)
class _Step:
    """What a rank does: add and cancel requests of one engine, in this order, and run a step of it."""

    engine: int  # the engine's number, in the order of Ranks.join
    calls: tuple[Request | Hashable, ...]  # a request to add, or the key of one to cancel


@dataclass(frozen=True)
class _End:
    """Rank 0 has finished, with this error if any."""

    error: BaichuanError | None = None


class Ranks:
    """The ranks of one communicator, over one engine or several, which every rank joins in the same order."""

    def __init__(self, comm: Communicator):
        self.comm = comm
        self._engines: list[Serving] = []

    def join(self, serving: Serving) -> Serving:
        """The engine to be used on rank 0, whose steps every rank then runs."""
        self._engines.append(serving)
        return serving if self.comm.world_size == 1 else _Together(serving, len(self._engines) - 1, self.comm)

    def lead(self, body: Callable[[], T]) -> T | None:
        """body() on rank 0, while the others compute their share of its steps; None there.

        A BaichuanError of rank 0 is raised on every rank; for another error of it the others raise UnsupportedError.
        """
        if self.comm.rank:
            self._follow()
            return None
        try:
            value = body()
        except BaichuanError as error:
            self.comm.broadcast_object(_End(error))
            raise
        except BaseException as error:  # else the other ranks would wait, and this process for them at its exit
            reason = f"rank 0 ended with {type(error).__name__}: {error}; correct that, the other ranks only follow it"
            self.comm.broadcast_object(_End(UnsupportedError(reason)))
            raise
        self.comm.broadcast_object(_End())
        return value

    def _follow(self) -> None:
        while isinstance(step := self.comm.broadcast_object(None), _Step):
            _run(self._engines[step.engine], step)
        if step.error:
            raise step.error


@dataclass
class _Together:
    """requests.Serving on rank 0: a step is told to the other ranks first."""

    serving: Serving
    number: int
    comm: Communicator

    def __post_init__(self):
        self._calls: list[Request | Hashable] = []

    @property
    def unfinished(self) -> int:
        return self.serving.unfinished + sum(isinstance(call, Request) for call in self._calls)

    @property
    def timing(self) -> Timing:
        return self.serving.timing

    def add(self, request: Request) -> None:
        self._calls.append(request)

    def cancel(self, key: Hashable) -> None:
        self._calls.append(key)

    def step(self) -> list[Progress]:
        step = _Step(self.number, tuple(self._calls))
        self._calls.clear()
        self.comm.broadcast_object(step)
        return _run(self.serving, step)


def _run(serving: Serving, step: _Step) -> list[Progress]:
    for call in step.calls:
        if isinstance(call, Request):
            serving.add(call)
        else:
            serving.cancel(call)
    return serving.step()
