"""What the processor is: its name for captions, its cache for judging speeds."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cpu_name() -> str:
    """As the system calls it, or the architecture where it says nothing."""
    try:
        found = re.search(r"^model name\s*:\s*(\S.*)$", CPUINFO.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return re.sub(r"\s+", " ", found[1]).strip() if found else platform.machine()


def cpu_cache_bytes() -> int:
    """Of the largest cache; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size[:-1]) * UNITS[size[-1]] for size in sizes if re.fullmatch(r"\d+[KMG]", size)), default=0)
