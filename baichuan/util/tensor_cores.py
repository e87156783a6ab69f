"""Faster products of float32 matrices on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products on a GPU take factors of 11 significant bits, and are four times as fast.  A mean of many is then off by
    1 / 2500 or less, and products of 8-bit integers are exact."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
