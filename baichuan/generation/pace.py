"""How long the GPU has still to do: requests that come until shortly before a step's end can be in the next one."""

from __future__ import annotations

import time
from collections import deque

REMEMBERED = 8  # steps
MARGIN_S = 0.0005


class Pace:
    """What steps have taken lately, and when the one that runs began."""

    def __init__(self):
        self._steps_s = {prefills: deque[float](maxlen=REMEMBERED) for prefills in (False, True)}
        self._host_s: deque[float] = deque(maxlen=REMEMBERED)  # seconds to plan and launch each of the last steps
        self._began_s = 0.0

    def launched(self, host_s: float) -> None:
        self._host_s.append(host_s)

    def ended(self, prefills: bool) -> None:
        """A step has ended, which computed parts of prompts or none; the next, launched before, begins."""
        now = time.perf_counter()
        self._steps_s[prefills].append(now - self._began_s)
        self._began_s = now

    def spare_s(self, prefills: bool) -> float:
        """Seconds until the host must begin to plan; not above 0 where too little is known.

        The step that runs takes no less than the shortest of the last ones of its kind.
        """
        steps_s = self._steps_s[prefills]
        if len(steps_s) < REMEMBERED:
            return 0.0
        due = self._began_s + min(steps_s) - max(self._host_s) - MARGIN_S
        return due - time.perf_counter()
