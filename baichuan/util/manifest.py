"""Sizes and SHA-256 digests that show whether a file is intact, taken per chunk so that cores share the work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from baichuan.errors import EngineError
from baichuan.util.affinity import cores

CHUNK_BYTES = 64 << 20
MOST_THREADS = 16
READ_BYTES = 8 << 20  # each thread's buffer: a thread that hashes asks for Python's lock twice for each


class Description(Protocol):
    """What `describe` says of a file, found out while something else goes on."""

    def entry(self) -> dict:
        """The result of `describe`, as soon as it is there."""


class Describer:
    """A Description by threads.  Of a file that is being written they read each chunk as soon as it is complete, of a
    complete file all chunks from begin() on.
    """

    def __init__(self, path: Path):
        self.path = path
        self._missing: dict[int, int] = {}  # bytes not yet written, by index of each chunk begun
        self._digests: dict[int, Future[str]] = {}
        self._pool = ThreadPoolExecutor(max(min(MOST_THREADS, cores() - 1), 2))  # a core is left to whoever waits

    def wrote(self, start: int, size: int) -> None:
        """Bytes start to start + size are in the file; each byte is reported once."""
        end = start + size
        while start < end:
            chunk, place = divmod(start, CHUNK_BYTES)
            part = min(CHUNK_BYTES - place, end - start)
            self._missing[chunk] = self._missing.get(chunk, CHUNK_BYTES) - part
            if not self._missing[chunk]:
                self._submit(chunk)
            start += part

    def begin(self) -> int:
        """Begin with every chunk of a complete file that was not begun.  Returns the file's size."""
        size = self.path.stat().st_size
        for chunk in range(-(-size // CHUNK_BYTES)):
            if chunk not in self._digests:
                self._submit(chunk)
        return size

    def entry(self) -> dict:
        """The result of `describe`; the file must be complete."""
        size = self.begin()
        chunks = range(-(-size // CHUNK_BYTES))
        return {"bytes": size, "sha256": [self._digests[chunk].result() for chunk in chunks]}

    def close(self) -> None:
        """Give up what is unfinished."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, chunk: int) -> None:
        self._digests[chunk] = self._pool.submit(_digest, self.path, chunk * CHUNK_BYTES)

    def __enter__(self) -> Describer:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def describe(path: Path) -> dict:
    """{"bytes": size, "sha256": [digest of each 64 MiB chunk]}"""
    with Describer(path) as describer:
        return describer.entry()


def one_digest(digests: Sequence[str]) -> str:
    """One digest, 64 hexadecimal digits, that identifies the file with these chunk digests."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def require_size(path: Path, entry: dict) -> None:
    """Raise EngineError unless the file is there and has the size that `describe` gave."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise EngineError(f"{path} is missing; build the engine again") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if size != entry["bytes"]:
        raise EngineError(f"{path} has {size} bytes instead of {entry['bytes']}; it is truncated, build it again")


def verify(path: Path, entry: dict, describer: Description | None = None) -> None:
    """Raise EngineError unless the file has the size and the digests that `describe` gave.

    describer: the file's, if its digests are being computed already
    """
    require_size(path, entry)
    try:
        found = describer.entry() if describer else describe(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if found["sha256"] != entry["sha256"]:
        raise EngineError(f"{path} differs from what the build wrote (SHA-256); it is damaged, build it again")


def _unreadable(path: Path, error: OSError) -> EngineError:
    return EngineError(f"{path} cannot be read ({error.strerror}); make it readable or build it again")


def seal(values: dict) -> dict:
    """values with a digest of themselves, so that an edit is noticed."""
    return values | {"sha256": values_digest(values)}


def sealed(values: dict) -> bool:
    """Whether nothing was edited since `seal`."""
    try:
        return values.get("sha256") == values_digest({key: value for key, value in values.items() if key != "sha256"})
    except RecursionError:  # what is nested just less than can be read
        return False


def values_digest(values: dict) -> str:
    """Of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(path: Path, start: int) -> str:
    """SHA-256 of the chunk that begins at `start`; the last chunk may be shorter."""
    found, end, buffer = hashlib.sha256(), start + CHUNK_BYTES, memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while start < end and (count := os.preadv(file.fileno(), [buffer[: end - start]], start)):
            found.update(buffer[:count])
            start += count
    return found.hexdigest()
