"""Tokens on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """An asynchronous copy of tokens to the host; tokens() waits for this copy alone, not for later work on the GPU."""

    def __init__(self, tokens: Tensor):
        self._host = tokens.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if tokens.is_cuda else None
        if self._event:
            self._event.record()

    def tokens(self) -> list[int]:
        if self._event:
            self._event.synchronize()
        return self._host.tolist()
