"""Several calls over one engine: each gets the progress of its own requests, whoever runs the steps.

Calls may come from several threads; one of them at a time runs a step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence, Set

from baichuan.generation.requests import Progress, Request, Serving


class Traffic:
    """The requests of all calls that are under way."""

    def __init__(self, serving: Serving, room: int):
        """room: how many unfinished requests the engine is given by one call; the others wait here."""
        self._serving, self._room = serving, room
        self._lock = threading.RLock()  # held between what is yielded; a call within a callback takes it again
        self._news: dict[Hashable, deque[Progress]] = {}  # where a request's progress goes, by key

    def progress(self, requests: Sequence[Request], stopped: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """What becomes of the requests, step by step, until all have ended.

        They are cancelled where `stopped` says so between two steps, and where the iterator is closed.
        """
        news: deque[Progress] = deque()
        waiting = deque(requests)
        running: set[Hashable] = set()
        try:
            while waiting or running:
                with self._lock:
                    while waiting and len(running) < self._room:
                        request = waiting.popleft()
                        running.add(request.key)
                        self._news[request.key] = news
                        self._serving.add(request)
                while not news:
                    with self._lock:
                        if news:  # by another thread's step
                            break
                        if stopped():
                            self._cancel(running)
                            news += (Progress(request.key, finish_reason="cancelled") for request in waiting)
                            waiting.clear()
                        self._step()
                progress = news.popleft()
                if progress.finished:
                    running.discard(progress.key)
                    with self._lock:
                        self._news.pop(progress.key, None)
                yield progress
        finally:
            with self._lock:
                self._cancel(running)
                for key in running:
                    del self._news[key]

    def cancel(self, key: Hashable) -> None:
        """End one request of a call that is under way; its last progress says so."""
        with self._lock:
            self._serving.cancel(key)

    def _step(self) -> None:
        for progress in self._serving.step():
            if progress.key in self._news:  # else its call was closed
                self._news[progress.key].append(progress)

    def _cancel(self, keys: Set[Hashable]) -> None:
        for key in sorted(keys, key=str):  # in one order, whatever the hashes are
            self._serving.cancel(key)
