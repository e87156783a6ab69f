"""Several calls over one engine: each gets the progress of its own requests, whoever runs the steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence

from baichuan.generation.requests import Progress, Request, Serving


class Traffic:
    """The requests of all calls that are under way."""

    def __init__(self, serving: Serving):
        self._serving = serving
        self._news: dict[Hashable, deque[Progress]] = {}  # where a request's progress goes, by key

    def progress(self, requests: Sequence[Request], stopped: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """What becomes of the requests, step by step, until all have ended.

        They are cancelled where `stopped` says so between two steps, and where the iterator is closed.
        """
        news: deque[Progress] = deque()
        unfinished = [request.key for request in requests]
        self._news |= dict.fromkeys(unfinished, news)
        try:
            for request in requests:
                self._serving.add(request)
            while unfinished:
                while not news:
                    if stopped():
                        self._cancel(unfinished)
                    self._step()
                progress = news.popleft()
                if progress.finished:
                    unfinished.remove(progress.key)
                yield progress
        finally:
            self._cancel(unfinished)
            for request in requests:
                del self._news[request.key]

    def cancel(self, key: Hashable) -> None:
        """End one request of a call that is under way; its last progress says so."""
        self._serving.cancel(key)

    def _step(self) -> None:
        for progress in self._serving.step():
            if progress.key in self._news:  # else its call was closed
                self._news[progress.key].append(progress)

    def _cancel(self, keys: Sequence[Hashable]) -> None:
        for key in keys:
            self._serving.cancel(key)
