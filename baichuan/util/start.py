"""When this process was started."""

from __future__ import annotations

import os
from pathlib import Path


def seconds_since_start() -> float:
    """Wall time since this process was started, imports included."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # in ticks since boot, as uptime
    return float(Path("/proc/uptime").read_text().split()[0]) - started / os.sysconf("SC_CLK_TCK")
