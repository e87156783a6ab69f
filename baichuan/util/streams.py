"""Standard streams that a program can use, however it was started."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def open_streams() -> None:
    """Closed standard streams lead nowhere, and characters that an output's encoding lacks are spelled out.

    Left closed, their numbers would go to the next files that are opened, which a library's messages would then damage.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)
    for handle, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(handle, "w", encoding="utf-8", closefd=False))  # noqa: SIM115  # as long as Python
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def lead_nowhere(stream: TextIO) -> None:
    """What is still written to the stream is lost without an error: Python writes what is left at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def printing(program: str) -> Iterator[None]:
    """What is printed within the block is written at its end, or one sentence and exit code 2 say that it was not."""
    open_streams()
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        lead_nowhere(sys.stdout)
        print(f"{program}: error: the output is cut off ({error.strerror}); write it elsewhere", file=sys.stderr)
        raise SystemExit(2) from None
