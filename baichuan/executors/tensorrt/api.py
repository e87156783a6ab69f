"""Which TensorRT is installed, what it logs, and its names for PyTorch's types.  Only doctor.py imports it too."""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from baichuan.config import require_choice
from baichuan.errors import UnsupportedError

logger = logging.getLogger(__name__)

INSTALL = {
    "tensorrt": "pip install --extra-index-url https://pypi.nvidia.com 'tensorrt>=11.4,<12'",
    "tensorrt_rtx": "pip install 'tensorrt-rtx>=1.7,<2'",
}
# A build on a machine without a driver or GPU logs these as errors and succeeds.
HARMLESS = re.compile(r"CUDA initialization failure with error: (35|100)\b|Unable to determine GPU memory usage")


@dataclass(frozen=True)
class Api:
    """A TensorRT module that is installed."""

    name: str  # tensorrt | tensorrt_rtx
    trt: Any  # the module
    version: str
    log: Any  # its ILogger: the module keeps a process's first one

    @property
    def rtx(self) -> bool:
        """TensorRT-RTX builds for compute capabilities, and its kernels are compiled when a plan is loaded."""
        return hasattr(self.trt, "ComputeCapability")

    @property
    def network_flags(self) -> int:
        """The flag of strongly typed networks; 0 where every network is one."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def dtype(self, dtype: torch.dtype):
        """The module's name for a PyTorch type."""
        return getattr(self.trt, DTYPE_NAMES[dtype])

    @property
    def torch_dtypes(self) -> dict:
        """The inverse of dtype()."""
        return {getattr(self.trt, name): dtype for dtype, name in DTYPE_NAMES.items()}


DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}


@cache
def load(name: str) -> Api:
    """The TensorRT module of that name.  Raises UnsupportedError when it is not installed or does not load."""
    require_choice("TensorRT module", name, INSTALL)
    try:
        trt = importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"{name} cannot be imported ({error}); install it with {INSTALL[name]}") from None
    api = Api(name, trt, trt.__version__, _logger_of(trt))
    logger.info("%s %s", name, api.version)
    return api


def _logger_of(trt):
    class Log(trt.ILogger):
        """Hands TensorRT's messages to logging and remembers the errors."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                if HARMLESS.search(message):
                    logger.debug("%s", message)
                    return
                self.errors.append(message)
            level = logging.WARNING if severity == trt.ILogger.WARNING else logging.DEBUG
            logger.log(level, "%s", message)

        def raise_errors(self, what: str) -> None:
            """Raise UnsupportedError with the first error since the last call, if there was one."""
            errors, self.errors = self.errors, []
            if errors:
                raise UnsupportedError(f"{what}: TensorRT says: {' '.join(errors[0].split())}")

    return Log()
