"""The processor's name, for captions, and its cache size, for judging measured speeds."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cpu_name() -> str:
    """The processor's name as the system reports it, or the architecture where it reports none."""
    try:
        found = re.search(r"^model name\s*:\s*(\S.*)$", CPUINFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return re.sub(r"\s+", " ", found[1]).strip() if found else platform.machine()


def cpu_cache_bytes() -> int:
    """Size of the largest cache; 0 where the system does not report it."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes if re.fullmatch(r"\d+[KMG]", size)), default=0)
