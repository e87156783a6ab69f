"""Checking that memory is free before it is allocated."""

from __future__ import annotations

import psutil
import torch

from baichuan.config import BYTES_PER_ELEMENT, BuildConfig, ModelConfig, QuantConfig
from baichuan.errors import UnsupportedError

KV_DTYPES = {"none": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # None = the model's dtype


def kv_cache_bytes(model: ModelConfig, quant: QuantConfig, tp_size: int, rows: int, capacity: int) -> int:
    """One rank's KV cache for `rows` sequences of `capacity` tokens."""
    element = BYTES_PER_ELEMENT[model.dtype] if quant.kv_cache == "none" else 1
    return 2 * model.num_layers * rows * capacity * (model.hidden_size // tp_size) * element


def full_kv_cache_bytes(model: ModelConfig, quant: QuantConfig, build: BuildConfig) -> int:
    """One rank's KV cache at every limit of the build."""
    return kv_cache_bytes(model, quant, build.world_size, build.max_rows, build.max_seq_len)


def sequence_kv_cache_bytes(model: ModelConfig, quant: QuantConfig, build: BuildConfig) -> int:
    """One rank's KV cache for the longest sequence of the build."""
    return kv_cache_bytes(model, quant, build.world_size, 1, build.max_seq_len)


def fits_host_memory(size: int) -> bool:
    """Whether `size` bytes of host memory are available."""
    return size <= psutil.virtual_memory().available


def require_host_memory(size: int, what: str) -> None:
    """Raise UnsupportedError unless `size` bytes of host memory are available."""
    if not fits_host_memory(size):
        available = psutil.virtual_memory().available
        raise UnsupportedError(
            f"{what} needs {size / 1e9:.2f} GB of host memory and {available / 1e9:.2f} GB are free; "
            "use a smaller batch, shorter lengths or more ranks"
        )


def free_device_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory that are free, PyTorch's unused blocks included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def spare_device_memory(device: torch.device) -> int:
    """Bytes that may be taken to make work faster: a tenth of the GPU's memory stays free for the work itself."""
    return max(free_device_memory(device) - torch.cuda.mem_get_info(device)[1] // 10, 0)


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the device's tensors lie."""
    return free_device_memory(device) if device.type == "cuda" else psutil.virtual_memory().available


def require_device_memory(size: int, what: str, device: torch.device) -> None:
    """Raise UnsupportedError unless `size` bytes of the GPU's memory are free."""
    free = free_device_memory(device)
    if size > free:
        raise UnsupportedError(
            f"{what} needs {size / 1e9:.2f} GB of GPU memory and {free / 1e9:.2f} GB are free; "
            "use a smaller batch, shorter lengths, more ranks or an 8-bit KV cache"
        )
