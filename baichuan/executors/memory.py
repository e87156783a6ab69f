"""Asking for memory before taking it."""

from __future__ import annotations

import psutil
import torch

from baichuan.errors import UnsupportedError

KV_DTYPES = {"none": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # None = the model's dtype


def require_host_memory(size: int, what: str) -> None:
    """Raise UnsupportedError unless `size` bytes of host memory are available."""
    available = psutil.virtual_memory().available
    if size > available:
        raise UnsupportedError(
            f"{what} needs {size / 1e9:.2f} GB of host memory and {available / 1e9:.2f} GB are free; "
            "use a smaller batch, shorter lengths or more ranks"
        )
