"""ops.Ops on a GPU.

A norm, a linear and a gated activation return what is still to be computed, and the op that consumes it chooses the
kernel: a norm is folded into the GEMV or the quantisation after it, silu_mul into the GEMV before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cuda.dense_copies import DenseCopies
from baichuan.executors.cuda.linear import CudaLinear, GatedInput, Input, dtype_of, materialise
from baichuan.kernels.decode_attention import choose_splits, decode_attention
from baichuan.kernels.kv_store import store_kv
from baichuan.kernels.norm import NormInput
from baichuan.kernels.prefill_attention import prefill_attention
from baichuan.kernels.rows import gather_rows
from baichuan.model import position
from baichuan.parallel.comm import Communicator
from baichuan.records import AttentionSpec, LayerCache, Step, Weight


@dataclass(frozen=True)
class Switches:
    """What the user chooses about the kernels: build.py's flags, and run.py's --no_weight_copies."""

    own_attention: bool = True  # --use_gpt_attention_plugin; else PyTorch's
    own_gemm: bool = True  # --use_gemm_plugin; else PyTorch's
    split_keys: bool = True  # --multi_block_mode
    keep_copies: bool = True  # of weight-only matrices, dequantised, in spare memory


@dataclass(frozen=True)
class Product:
    """x @ Wᵀ, still to be computed."""

    x: Input
    weight: Weight


class CudaOps:
    """ops.Ops for sequences of up to `capacity` tokens.  Nothing waits for the GPU with own_attention."""

    def __init__(
        self,
        spec: AttentionSpec,
        comm: Communicator,
        capacity: int,
        device: torch.device,
        switches: Switches,
        copies: DenseCopies | None = None,
    ):
        self.comm, self.switches = comm, switches
        self.multiply = CudaLinear(comm, switches.own_gemm, copies)
        slopes = position.alibi_slopes(spec.total_heads)[spec.first_head :][: spec.num_heads]
        self.slopes = slopes.to(device)
        unread = self.slopes, self.slopes
        self.cos, self.sin = position.rope_table(capacity, spec.head_dim, device) if spec.rotary else unread
        if not switches.own_attention:
            self.library = ReferenceOps(spec, comm, capacity, device)

    def embedding(self, tokens, weight):
        return gather_rows(weight, tokens)

    def add_rms_norm(self, x, residual, weight, eps):
        x = self._tensor(x)
        total = x if residual is None else torch.empty_like(x)
        return NormInput(x, residual, weight, eps, total), total

    def linear(self, x: Input, weight: Weight) -> Product:
        return Product(x, weight)

    def attention(self, qkv: Product, cache: LayerCache, spec: AttentionSpec, step: Step) -> Tensor:
        qkv = self._tensor(qkv)
        if not self.switches.own_attention:
            return self.library.attention(qkv, cache, spec, step)
        if step.max_new_tokens == 1:
            splits = self.splits(step, spec)
            return decode_attention(qkv, self.cos, self.sin, self.slopes, cache, spec, step, splits)
        store_kv(qkv, self.cos, self.sin, cache, spec, step)
        return prefill_attention(qkv, self.slopes, cache, spec, step)

    def splits(self, step: Step, spec: AttentionSpec) -> int:
        """Into how many blocks a decode step's keys are split."""
        if not self.switches.split_keys:
            return 1
        return choose_splits(step.batch_size * spec.num_heads)

    def silu_mul(self, gate_up: Product) -> Input:
        if isinstance(gate_up, Product):
            return self.multiply.gated(gate_up.x, gate_up.weight, dtype_of(gate_up.x))
        return GatedInput(gate_up)

    def all_reduce(self, x):
        return self.comm.all_reduce(self._tensor(x))

    def select_rows(self, x: Input, rows) -> Input:
        if isinstance(x, NormInput) and x.x.shape[0] == rows.shape[0] == 1:
            return x  # the one row there is
        return gather_rows(materialise(x), rows)

    def head(self, x: Input, weight: Weight, vocab_size: int) -> Tensor:
        return self.comm.all_gather(self.multiply(x, weight, torch.float32))[:, :vocab_size]

    def _tensor(self, x) -> Tensor:
        """x, computed if it is pending."""
        return self.multiply(x.x, x.weight, dtype_of(x.x)) if isinstance(x, Product) else materialise(x)
