"""The NVIDIA GPUs of this machine as its driver knows them, whether PyTorch can use them or not."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

TIMEOUT_S = 20.0


def driver_gpus() -> list[str]:
    """`name, driver version` of each GPU that the driver lists; without nvidia-smi, the device files."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done and done.returncode == 0:
            return done.stdout.splitlines()
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def start_gpu(index: int) -> None:
    """Make the primary context of this GPU, which PyTorch then finds made; it takes 0.4 s.  For any of its threads.

    Raises OSError where there is no driver or it refuses.
    Source: CUDA Driver API, "Primary Context Management".
    """
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    calls = (
        (driver.cuInit, 0),
        (driver.cuDeviceGet, ctypes.byref(device), index),
        (driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device),
    )
    for call, *values in calls:
        if code := call(*values):
            raise OSError(f"the driver cannot start GPU {index}: {call.__name__} gives {code}")
