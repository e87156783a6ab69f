"""The backends that build.py --backend names and config.json records.

A new one is a class with executors.backend.Backend's methods, and an entry here and in config.BACKEND_NAMES.
"""

from __future__ import annotations

from baichuan.executors.backend import Backend
from baichuan.executors.tensorrt.backend import TensorRtBackend
from baichuan.executors.torch_backend import TorchBackend

BACKENDS: dict[str, Backend] = {
    "torch": TorchBackend(),
    "tensorrt_rtx": TensorRtBackend("tensorrt_rtx"),  # before tensorrt: messages recommend what pip installs
    "tensorrt": TensorRtBackend("tensorrt"),
}
