"""How an engine is opened.  Imports no PyTorch, because flags take their defaults and limits from here."""

from __future__ import annotations

from dataclasses import dataclass

from baichuan.config import DEVICES, require_choice, require_range

LEAST_FRACTION = 0.01  # of the free memory, for a paged KV cache


@dataclass(frozen=True)
class OpenSettings:
    """Where an engine runs, and how much memory it may take."""

    device: str = "auto"  # one of config.DEVICES
    keep_copies: bool = True  # spare GPU memory may hold dequantised copies of weights (executors/cuda/dense_copies.py)
    kv_cache_free_gpu_mem_fraction: float = 0.9  # most that a paged KV cache takes of the free memory

    def __post_init__(self):
        require_choice("device", self.device, DEVICES)
        require_choice("keep_copies", self.keep_copies, (True, False))
        fraction = self.kv_cache_free_gpu_mem_fraction
        require_range("kv_cache_free_gpu_mem_fraction", fraction, LEAST_FRACTION, 1.0)
