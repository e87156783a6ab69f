"""ops.Ops on a GPU.

Every op chooses its product first (linear.py).  The kernel that makes the product's input, a norm or silu_mul, then
writes it in the form that the product takes, and a GEMV applies silu_mul itself.  The kernels of one layer:

    INT8, one token       add_rms_norm -> Int16 | gemv_int            norm_linear
                          decode_attention | combine_splits           attention
                          quantise_rows -> Int16 | gemv_int           partial_linear
                          add_rms_norm -> Int16 | gemv_int with silu  gated_mlp
                          quantise_rows -> Int16 | gemv_int
    float16, 300 tokens   add_rms_norm | cuBLAS                       norm_linear
                          store_kv | prefill_attention                attention
                          cuBLAS                                      partial_linear
                          add_rms_norm | cuBLAS | silu_mul | cuBLAS   gated_mlp
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cuda.comm import slots_of
from baichuan.executors.cuda.dense_copies import DenseCopies
from baichuan.executors.cuda.linear import Choice, LinearKernel, choose_kernel
from baichuan.kernels.decode_attention import decode_attention
from baichuan.kernels.exchange import quantise_over_ranks
from baichuan.kernels.kv_store import store_kv
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN, Form, Int8PerToken, Operand, Plain, StaticScale, plain, smoother_of
from baichuan.kernels.peers import Slots
from baichuan.kernels.prefill_attention import prefill_attention
from baichuan.kernels.rows import gather_rows, quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.kernels.splits import MOST_COUNTED, Splits, choose_splits
from baichuan.kernels.sum_norm import sum_norm
from baichuan.model import position
from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import quantise, scale_for
from baichuan.records import AttentionSpec, LayerCache, Step, Weight


@dataclass(frozen=True)
class Sent:
    """An ops.Part that the product which made it has sent to the peers, too."""

    values: Tensor  # [num_tokens, hidden_size]
    slots: Slots


@dataclass(frozen=True)
class Switches:
    """The user's choices of kernels: build.py's flags, and run.py's --no_weight_copies."""

    own_attention: bool = True  # --use_gpt_attention_plugin; else PyTorch's
    own_gemm: bool = True  # --use_gemm_plugin; else PyTorch's
    split_keys: bool = True  # --multi_block_mode
    keep_copies: bool = True  # dequantised copies of weight-only matrices in spare memory


class CudaOps:
    """ops.Ops for sequences of up to `capacity` tokens.  With own_attention the host never waits for the GPU.

    An ops.Part is a tensor or Sent.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        comm: Communicator,
        capacity: int,
        device: torch.device,
        switches: Switches,
        copies: DenseCopies | None = None,
    ):
        self.comm, self.switches, self.copies = comm, switches, copies or DenseCopies()
        slopes = position.alibi_slopes(spec.total_heads)[spec.first_head :][: spec.num_heads]
        self.slopes = slopes.to(device)
        self.ended = torch.zeros(MOST_COUNTED, dtype=torch.int32, device=device)  # decode_attention's counters
        self.cos = self.sin = self.slopes  # which no kernel reads with ALiBi
        if spec.rotary:
            self.cos, self.sin = position.rope_table(capacity, spec, device)
        if not switches.own_attention:
            self.library = ReferenceOps(spec, comm, capacity, device)

    def embedding(self, tokens, weight):
        return gather_rows(weight, tokens)

    def norm_linear(self, x, residual, norm, weight: Weight, eps: float):
        return self._norm_linear(x, residual, norm, weight, eps, values_of(x).dtype)

    def partial_linear(self, x, weight: Weight) -> Tensor | Sent:
        kernel = self.kernel(weight, x)
        return self._part(kernel, self.operand(x, kernel.form), weight, x.dtype)

    def attention(self, qkv, cache: LayerCache, spec: AttentionSpec, step: Step) -> Tensor:
        if not self.switches.own_attention:
            return self.library.attention(qkv, cache, spec, step)
        out = torch.empty(qkv.shape[0], spec.num_heads * spec.head_dim, dtype=qkv.dtype, device=qkv.device)
        if step.singles < step.batch_size:
            store_kv(qkv, self.cos, self.sin, cache, spec, step)
            split = self.switches.split_keys and not step.singles
            prefill_attention(qkv, self.slopes, cache, spec, step, out, split)
        if step.singles:
            splits = self.splits(step, spec)
            decode_attention(qkv, self.cos, self.sin, self.slopes, cache, spec, step, splits, out, self.ended)
        return out

    def splits(self, step: Step, spec: AttentionSpec) -> Splits:
        """Into how many splits the keys of single tokens are cut."""
        if not self.switches.split_keys:
            return Splits(1, 1)
        return choose_splits(step.singles * spec.num_heads)

    def gated_mlp(self, x, residual, norm, gate_up: Weight, down_proj: Weight, eps: float):
        up, down, dtype = self.kernel(gate_up, values_of(x)), self.kernel(down_proj, values_of(x)), norm.dtype
        normed, residual = self._norm(x, residual, norm, eps, up.form)
        if up.run_gated:
            activated = self.operand(up.run_gated(normed, dtype), down.form)
        elif up.run_activated and isinstance(down.form, StaticScale) and down.form.dtype == torch.int8:
            activated = up.run_activated(normed, dtype, down.form)
        elif isinstance(down.form, Int8PerToken) and down.form.over_ranks:
            activated = self._quantise_over_ranks(up.run(normed, dtype), down.form, activates=True)
        else:
            activated = silu_mul(up.run(normed, dtype), down.form)
        return self._part(down, activated, down_proj, dtype), residual

    def norm_head(self, x, residual, norm, weight: Weight, rows, vocab_size: int, eps: float):
        if values_of(x).shape[0] == rows.shape[0] == 1:  # the one row there is
            logits, _ = self._norm_linear(x, residual, norm, weight, eps, torch.float32)
        else:
            normed, _ = self._norm(x, residual, norm, eps, PLAIN)
            logits = self._linear(gather_rows(normed.values, rows), weight, torch.float32)
        return self.comm.all_gather(logits)[:, :vocab_size]

    def kernel(self, weight: Weight, x: Tensor) -> LinearKernel:
        """The kernel for as many tokens as x has."""
        return choose_kernel(weight, Choice(x.shape[0], x.dtype, self.comm, self.switches.own_gemm, self.copies))

    def operand(self, x: Tensor, form: Form) -> Operand:
        """x in the given form."""
        match form:
            case Plain():
                return plain(x)
            case Int8PerToken(over_ranks=True):
                return self._quantise_over_ranks(x, form)
        return quantise_rows(x, form)

    def _quantise_over_ranks(self, x: Tensor, form: Int8PerToken, activates: bool = False) -> Operand:
        """x, or if it activates silu_mul of x, in the form."""
        assert form.smoother is not None, "a weight whose input is shared by ranks has one"
        slots = slots_of(self.comm, x.shape[0] * torch.float32.itemsize)
        if slots:
            return quantise_over_ranks(x, form.smoother, slots, activates)
        x = (silu_mul(x).values if activates else x).float() / form.smoother
        scale = scale_for(self.comm.all_reduce_max(x.abs().amax(-1, keepdim=True)), torch.int8)
        return Operand(form, quantise(x, scale, torch.int8), scale)

    def _part(self, kernel: LinearKernel, x: Operand, weight: Weight, dtype: torch.dtype) -> Tensor | Sent:
        """The product of this rank's share of the input channels, sent to the peers where its kernel can."""
        slots = slots_of(self.comm, weight.shape[0] * dtype.itemsize) if kernel.run_sending else None
        if kernel.run_sending and slots:
            return Sent(kernel.run_sending(x, dtype, slots), slots)
        return kernel.run(x, dtype)

    def _linear(self, x: Tensor, weight: Weight, out_dtype: torch.dtype) -> Tensor:
        kernel = self.kernel(weight, x)
        return kernel.run(self.operand(x, kernel.form), out_dtype)

    def _norm_linear(self, x, residual, norm, weight: Weight, eps: float, out_dtype: torch.dtype):
        kernel = self.kernel(weight, values_of(x))
        normed, residual = self._norm(x, residual, norm, eps, kernel.form)
        return kernel.run(normed, out_dtype), residual

    def _norm(self, x, residual, norm, eps: float, form: Form) -> tuple[Operand, Tensor]:
        """(norm of all_reduce(x) + residual in the given form, all_reduce(x) + residual); without a residual, of x"""
        if smoother_of(form) is not None:
            normed, residual = self._norm(x, residual, norm, eps, PLAIN)
            return self.operand(normed.values, form), residual
        if isinstance(x, Sent):
            return sum_norm(x.values, residual, norm, eps, form, x.slots, sent=True)
        if residual is not None:
            slots = slots_of(self.comm, x.nbytes)
            if slots:
                return sum_norm(x, residual, norm, eps, form, slots)
            x = self.comm.all_reduce(x)
        return add_rms_norm(x, residual, norm, eps, form)


def values_of(x: Tensor | Sent) -> Tensor:
    """x, or this rank's part of it."""
    return x.values if isinstance(x, Sent) else x
