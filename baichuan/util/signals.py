"""Signals that end a program: held off for a moment, or made an exception that closes what is open."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignored(*signals: signal.Signals) -> Iterator[None]:
    """The signals change nothing meanwhile, here and in processes that start meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated meanwhile, once, so that what is open is closed and deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
