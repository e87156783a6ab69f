"""ops.Ops by the C kernels, and by PyTorch where its library is faster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.executors.cpu.library import instruction_sets
from baichuan.executors.cpu.native import FEW_ROWS, Kernels, Matrix, cache_struct
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cpu.reference_linear import linear as reference_linear
from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import scale_for
from baichuan.quant.smoothquant import quantise_input
from baichuan.records import AttentionSpec, DenseWeight, LayerCache, SmoothQuantWeight, Step, Weight

FEW_QUERIES = 8  # new tokens of a sequence up to which each attends by itself
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # with one of these oneDNN's products are the faster ones
INT8_UNITS = {"avx512_vnni", "avx_vnni", "amx_int8"}


class CpuOps(ReferenceOps):
    """ops.Ops for sequences of up to `capacity` tokens."""

    def __init__(self, spec: AttentionSpec, comm: Communicator, capacity: int, kernels: Kernels):
        super().__init__(spec, comm, capacity)
        self.kernels = kernels
        self._matrices: dict[int, tuple[Weight, Matrix | None]] = {}  # by id; the weight keeps its own
        self._caches: dict[int, tuple] = {}
        self._step: tuple[Step | None, Tensor, Tensor] = (None, torch.empty(0), torch.empty(0))

    def add_rms_norm(self, x, residual, weight, eps):
        return self.kernels.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up):
        return self.kernels.silu_mul(gate_up)

    def linear(self, x, weight: Weight):
        return self._linear(x, weight, x.dtype)

    def head(self, x, weight: Weight, vocab_size: int):
        return self.comm.all_gather(self._linear(x, weight, torch.float32))[:, :vocab_size]

    def _linear(self, x: Tensor, weight: Weight, out_dtype: torch.dtype) -> Tensor:
        matrix = self._matrix(weight)
        if matrix is None:
            return reference_linear(x, weight, out_dtype, self.comm)
        if x.shape[0] > FEW_ROWS:
            match weight:
                case DenseWeight(w) if w.dtype == out_dtype == torch.bfloat16 and BFLOAT16_UNITS & instruction_sets():
                    return F.linear(x, w)
                case SmoothQuantWeight(q, scale) if INT8_UNITS & instruction_sets():
                    x8, input_scale = quantise_input(x, weight, self.comm)
                    return (torch._int_mm(x8, q.t()).float() * input_scale * scale).to(out_dtype)
        return self.kernels.product(x, matrix, out_dtype, self._shared_scales(x, weight))

    def _shared_scales(self, x: Tensor, weight: Weight) -> Tensor | None:
        """SmoothQuant's scale of each token where the token's channels lie on several ranks (quantise_input)."""
        if not isinstance(weight, SmoothQuantWeight) or self.comm.world_size == 1:
            return None
        if weight.smoother is None or weight.input_scale is not None:
            return None
        absmax = (x.float() / weight.smoother).abs().amax(-1, keepdim=True)
        return scale_for(self.comm.all_reduce_max(absmax), torch.int8)

    def _matrix(self, weight: Weight) -> Matrix | None:
        known = self._matrices.get(id(weight))
        if known is None:
            known = self._matrices[id(weight)] = (weight, Matrix.of(weight))
        return known[1]

    def attention(self, qkv, cache: LayerCache, spec: AttentionSpec, step: Step):
        rows, positions = self._places(step)
        known = self._caches.get(id(cache))
        if known is None:
            known = self._caches[id(cache)] = (cache, cache_struct(cache, self.cos, self.sin, self.slopes))
        self.kernels.store_tokens(known[1], qkv, rows, positions)
        if step.max_new_tokens <= FEW_QUERIES:
            return self.kernels.attend(known[1], qkv, rows, positions, step.max_context_length)
        return self.attend_stored(qkv.unflatten(-1, (3, spec.num_heads, -1))[:, 0], cache, step)

    def _places(self, step: Step) -> tuple[Tensor, Tensor]:
        """Row of the cache and position of each token, for all layers of a step."""
        if self._step[0] is not step:
            lengths = step.cu_seqlens.diff()
            rows = torch.arange(step.batch_size).repeat_interleave(lengths)
            self._step = (step, rows, step.positions.contiguous())
        return self._step[1:]
