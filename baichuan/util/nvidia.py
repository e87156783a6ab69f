"""The NVIDIA GPUs of this machine as its driver knows them, whether PyTorch can use them or not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TIMEOUT_S = 20.0


def driver_gpus() -> list[str]:
    """`name, driver version` of each GPU that the driver lists; without nvidia-smi, the device files."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done and done.returncode == 0:
            return done.stdout.splitlines()
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
