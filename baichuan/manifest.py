"""Proof that files are what was written: sizes and SHA-256 digests, taken in chunks so that cores share the work."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baichuan.errors import EngineError

CHUNK_BYTES = 64 << 20
READ_BYTES = 1 << 20  # each thread's buffer


def describe(path: Path) -> dict:
    """{"bytes": size, "sha256": [digest of each 64 MiB chunk]}"""
    return {"bytes": path.stat().st_size, "sha256": _digests(path)}


def verify(path: Path, entry: dict) -> None:
    """Raise EngineError unless the file has the size and the digests that `describe` gave."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise EngineError(f"{path} has {size} bytes instead of {entry['bytes']}; it is truncated, build it again")
        digests = _digests(path)
    except FileNotFoundError:
        raise EngineError(f"{path} is missing; build the engine again") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); make it readable or build it again") from None
    if digests != entry["sha256"]:
        raise EngineError(f"{path} differs from what the build wrote (SHA-256); it is damaged, build it again")


def seal(values: dict) -> dict:
    """values with a digest of themselves, so that an edit is noticed."""
    return values | {"sha256": _own_digest(values)}


def sealed(values: dict) -> bool:
    """Whether nothing was edited since `seal`."""
    return values.get("sha256") == _own_digest({key: value for key, value in values.items() if key != "sha256"})


def _own_digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digests(path: Path) -> list[str]:
    size = path.stat().st_size

    def digest(start: int) -> str:
        found, end = hashlib.sha256(), min(start + CHUNK_BYTES, size)
        with open(path, "rb", buffering=0) as file:
            while start < end and (data := os.pread(file.fileno(), min(READ_BYTES, end - start), start)):
                found.update(data)
                start += len(data)
        return found.hexdigest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, range(0, size, CHUNK_BYTES)))
