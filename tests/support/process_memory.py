"""How much memory a program takes while it runs, and this one while it refuses something."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from baichuan.errors import BaichuanError

INTERVAL_S = 0.05


def peak_anonymous_bytes(command: Sequence[str]) -> int:
    """The most anonymous memory of `command`, which must succeed, and its children; mapped files do not count."""
    peak = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(psutil.Process(process.pid)))
            time.sleep(INTERVAL_S)
    if process.returncode:
        raise AssertionError(f"{command} ended with exit code {process.returncode}")
    return peak


def _anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous bytes of the process and its children; pages that several share count once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total


# Large


def growth(read: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while read() fails with a BaichuanError."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    with pytest.raises(BaichuanError):
        read()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10
