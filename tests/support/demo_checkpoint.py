"""The demo's checkpoint, trained by demo/train.py for as few steps as a test needs."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from demo import train


@cache
def demo_checkpoint(version: str, steps: int) -> Path:
    """The folder, made once for all tests of a process; it goes when the process ends."""
    holder = tempfile.TemporaryDirectory(prefix="demo-checkpoint-")
    _holders.append(holder)
    folder = Path(holder.name) / version
    assert train.main(["--model_version", version, "--output_dir", str(folder), "--steps", str(steps)]) == 0
    return folder


_holders: list[tempfile.TemporaryDirectory] = []
