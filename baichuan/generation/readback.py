"""Tensors on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """An asynchronous copy to the host, for which wait() waits alone, not for later work on the GPU."""

    def __init__(self, values: Tensor):
        self._host = values.to("cpu", non_blocking=True, copy=True)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event:
            self._event.record()

    def wait(self) -> Tensor:
        if self._event:
            self._event.synchronize()
        return self._host
