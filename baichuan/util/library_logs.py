"""Messages of libraries go the way of ours, which spells out control characters."""

from __future__ import annotations

import logging


def through_our_log(*names: str) -> None:
    """Hand the messages of these libraries, which are imported already, to the root logger alone."""
    for name in names:
        library = logging.getLogger(name)
        for handler in library.handlers[:]:
            library.removeHandler(handler)
        library.propagate = True
