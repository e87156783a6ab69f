"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Counts up to `total`; use it as a context manager.  unit "B" is shown in powers of 1000."""

    def __init__(self, label: str, total: int, unit: str, interval_s: float = 10.0):
        self.label, self.total, self.unit, self.interval_s = label, total, unit, interval_s
        self.done = 0
        self._start = self._last = time.monotonic()
        scaled = unit == "B"
        shown = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=scaled, leave=False) if shown else None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """note: what else is shown, such as a rate."""
        self.done += amount
        if self._bar:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last >= self.interval_s and self.done < self.total:
            self._last = time.monotonic()
            left_s = (self._last - self._start) * (self.total - self.done) / max(self.done, 1)
            more = f", {note}" if note else ""
            logger.info("%s: %.0f %%%s, %.0f s left", self.label, 100 * self.done / self.total, more, left_s)

    def clear(self) -> None:
        """Makes room for other output; the next advance draws the bar again."""
        if self._bar:
            self._bar.clear()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.close()
