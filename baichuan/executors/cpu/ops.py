"""ops.Ops by the C kernels; some products by PyTorch where its operators are faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baichuan.executors.cpu.linear import CpuLinear
from baichuan.executors.cpu.native import Kernels, cache_struct
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.parallel.comm import Communicator
from baichuan.records import AttentionSpec, LayerCache, Step, Weight


class CpuOps(ReferenceOps):
    """ops.Ops for sequences of up to `capacity` tokens."""

    def __init__(self, spec: AttentionSpec, comm: Communicator, capacity: int, kernels: Kernels):
        super().__init__(spec, comm, capacity)
        self.kernels = kernels
        self.multiply = CpuLinear(kernels, comm)
        self._caches: dict[LayerCache, Any] = {}  # each layer's cache as a C struct
        self._step: tuple[Step | None, Tensor, Tensor] = (None, torch.empty(0), torch.empty(0))

    def add_rms_norm(self, x, residual, weight, eps):
        return self.kernels.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up):
        return self.kernels.silu_mul(gate_up)

    def norm_linear(self, x, residual, norm, weight: Weight, eps: float):
        matrix = self.multiply.matrix_of(weight, x)
        if matrix is None:
            return super().norm_linear(x, residual, norm, weight, eps)
        x = x if residual is None else self.all_reduce(x)
        return self.kernels.norm_product(x, residual, norm, matrix, eps)

    def gated_mlp(self, x, residual, norm, gate_up: Weight, down_proj: Weight, eps: float):
        first, second = self.multiply.matrix_of(gate_up, x), self.multiply.matrix_of(down_proj, x)
        if first is None or second is None:
            return super().gated_mlp(x, residual, norm, gate_up, down_proj, eps)
        x = x if residual is None else self.all_reduce(x)
        return self.kernels.gated_mlp(x, residual, norm, first, second, eps)

    def linear(self, x, weight: Weight):
        return self.multiply(x, weight, x.dtype)

    def head(self, x, weight: Weight, vocab_size: int):
        return self.comm.all_gather(self.multiply(x, weight, torch.float32))[:, :vocab_size]

    def attention(self, qkv, cache: LayerCache, spec: AttentionSpec, step: Step):
        rows, positions = self._places(step)
        struct = self._caches.get(cache)
        if struct is None:
            struct = self._caches[cache] = cache_struct(cache, self.cos, self.sin, self.slopes)
        return self.kernels.attend(struct, qkv, rows, positions, step.cu_seqlens, step.max_context_length)

    def _places(self, step: Step) -> tuple[Tensor, Tensor]:
        """Each token's row and position in the cache, computed once per step."""
        if self._step[0] is not step:
            lengths = step.cu_seqlens.diff()
            rows = torch.arange(step.batch_size).repeat_interleave(lengths)
            self._step = (step, rows, step.positions.contiguous())
        return self._step[1:]
