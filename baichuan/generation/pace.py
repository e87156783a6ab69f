"""How long the GPU has still to do: requests that come until shortly before a step's end can be in the next one."""

from __future__ import annotations

import time
from collections import deque

REMEMBERED = 8  # steps
MARGIN_S = 0.0005


class Pace:
    """What steps have taken lately, and when the one that runs began."""

    def __init__(self):
        self._steps_s: deque[float] = deque(maxlen=REMEMBERED)  # of decode steps, the shortest there are
        self._host_s: deque[float] = deque(maxlen=REMEMBERED)  # to plan and launch a step
        self._began_s = 0.0

    def launched(self, host_s: float) -> None:
        self._host_s.append(host_s)

    def ended(self, decodes: bool) -> None:
        """A step has ended, which decoded alone or not; the next begins, as it was launched before."""
        now = time.perf_counter()
        if decodes:
            self._steps_s.append(now - self._began_s)
        self._began_s = now

    def spare_s(self) -> float:
        """Seconds until the host must begin to plan; not above 0 where too little is known."""
        if len(self._steps_s) < REMEMBERED:
            return 0.0
        due = self._began_s + min(self._steps_s) - max(self._host_s) - MARGIN_S
        return due - time.perf_counter()
