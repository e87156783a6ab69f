"""Ops of calibration's passes, in float32 on either device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.parallel.comm import Communicator
from baichuan.records import AttentionSpec, DenseWeight, LayerCache, Step, Weight


class DenseOps(ReferenceOps):
    """The reference's ops on dense float32 weights."""

    def linear(self, x, weight):
        return F.linear(x, weight.weight)


class Reached(Exception):
    """The input x of the linear that was looked for; what comes after it in the layer is left out."""

    def __init__(self, x: Tensor):
        self.x = x


class OpsUpTo(DenseOps):
    """Ops that raise Reached at the linear `last`."""

    last: DenseWeight

    def linear(self, x, weight):
        if weight is self.last:
            raise Reached(x)
        return super().linear(x, weight)


class RepeatingOps(ReferenceOps):
    """Ops for passes of the same tokens through a layer whose weights are exchanged: what comes before the first weight
    that is another one than in the pass before is not computed again."""

    def __init__(self, spec: AttentionSpec, comm: Communicator, capacity: int, device: torch.device | str = "cpu"):
        super().__init__(spec, comm, capacity, device)
        self._results: list[tuple[Any, Any]] = []  # (weight, result) of each op of a pass, in order
        self._place = 0

    def restart(self) -> None:
        """Begin the next pass."""
        self._place = 0

    def add_rms_norm(self, x, residual, weight, eps):
        return self._once(weight, lambda: super(RepeatingOps, self).add_rms_norm(x, residual, weight, eps))

    def linear(self, x, weight: Weight):
        return self._once(weight, lambda: super(RepeatingOps, self).linear(x, weight))

    def attention(self, qkv, cache: LayerCache, spec: AttentionSpec, step: Step):
        return self._once(None, lambda: super(RepeatingOps, self).attention(qkv, cache, spec, step))

    def silu_mul(self, gate_up):
        return self._once(None, lambda: super(RepeatingOps, self).silu_mul(gate_up))

    def _once(self, weight: Any, op: Callable[[], Any]) -> Any:
        """The op's result, from the pass before if that had the same weights up to here."""
        place = self._place
        self._place += 1
        if place == len(self._results) or self._results[place][0] is not weight:
            del self._results[place:]
            self._results.append((weight, op()))
        return self._results[place][1]
