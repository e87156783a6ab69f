"""Signals that end a program: ignored or deferred for a while, or raised as an exception that lets cleanup run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last comes when a terminal is closed


def end_quietly() -> None:
    """Ctrl-C ends the process at once: while it imports, or leaves, a traceback would say nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored: nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_by_exception() -> None:
    """Undo end_quietly()."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """The process was asked to end, by the signal of this number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block the first SIGTERM or SIGHUP raises Terminated, so that files are closed and temporary ones
    deleted.  A SIGHUP that is ignored, as by nohup, still is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [each for each in ENDING[1:] if signal.getsignal(each) is not signal.SIG_IGN]

    def terminate(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    before = {each: signal.signal(each, terminate) for each in numbers}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
