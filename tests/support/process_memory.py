"""How much memory a program takes while it runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

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
