"""Signals that end a program: ignored or deferred for a while, or raised as an exception that lets cleanup run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ignored(*signals: signal.Signals) -> Iterator[None]:
    """Within the block the signals are ignored, here and in processes started within it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def deferred(*signals: signal.Signals) -> Iterator[None]:
    """Signals that come within the block are delivered at its end, each once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in sorted(set(came)):
            signal.raise_signal(number)


@contextmanager
def noticed(*signals: signal.Signals) -> Iterator[list[tuple[int, float]]]:
    """Within the block signals do what they did; the list that is yielded has those that came, and time.monotonic().

    A library that is interrupted may raise another exception than the handler's: PyTorch's slices do.
    """
    came: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def notice(number: int, frame: FrameType | None) -> None:
        came.append((number, time.monotonic()))
        handlers[signal.Signals(number)](number, frame)

    handlers = {each: handler for each in signals if callable(handler := signal.getsignal(each))}
    for each in handlers:
        signal.signal(each, notice)
    try:
        yield came
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within the block the first SIGTERM raises Terminated, so that files are closed and temporary ones deleted."""
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
