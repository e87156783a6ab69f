"""The reference executor: every op as its plain formula in PyTorch; the other executors are tested against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.reference_linear import linear
from baichuan.executors.kv_cache import KVCache, PoolSettings
from baichuan.model import position
from baichuan.model.decoder import attention_spec, forward
from baichuan.model.ops import ComposedOps
from baichuan.parallel.comm import Communicator, Solo
from baichuan.quant.kv_cache import dequantise_kv, quantise_kv
from baichuan.records import AttentionSpec, LayerCache, ModelWeights, Step, Weight


class ReferenceOps(ComposedOps):
    """ops.Ops on CPU tensors; its attention on any device."""

    def __init__(self, spec: AttentionSpec, comm: Communicator, capacity: int, device: torch.device | str = "cpu"):
        self.comm = comm
        self.slopes: Tensor | None = None  # [heads] float32 with ALiBi
        self.cos: Any = None  # like sin [capacity, head_dim / 2] float32 with RoPE
        self.sin: Any = None
        if spec.rotary:
            self.cos, self.sin = position.rope_table(capacity, spec, device)
        else:
            self.slopes = position.alibi_slopes(spec.total_heads)[spec.first_head :][: spec.num_heads].to(device)

    def embedding(self, tokens, weight):
        return F.embedding(tokens, weight)

    def add_rms_norm(self, x, residual, weight, eps):
        residual = x if residual is None else x + residual
        r = residual.float()
        normed = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight, residual

    def linear(self, x, weight: Weight):
        return linear(x, weight, x.dtype, self.comm)

    def attention(self, qkv, cache: LayerCache, spec: AttentionSpec, step: Step):
        heads = qkv.unflatten(-1, (3 * spec.num_heads, spec.head_dim))
        q, k, v = heads.split(spec.num_heads, 1)  # each [num_tokens, heads, dim]
        if spec.rotary:
            cos, sin = self.cos[step.positions], self.sin[step.positions]
            q, k = position.rotate(heads[:, : 2 * spec.num_heads], cos, sin).to(qkv.dtype).chunk(2, 1)
        lengths = step.cu_seqlens.diff()
        rows = torch.arange(step.batch_size, device=q.device).repeat_interleave(lengths)
        blocks = cache.tables[rows, step.positions // cache.tokens_per_block].long()
        places = step.positions % cache.tokens_per_block
        cache.k[blocks, :, places] = quantise_kv(k, cache.k_scale, cache.k.dtype)
        cache.v[blocks, :, places] = quantise_kv(v, cache.v_scale, cache.v.dtype)
        out, starts = torch.empty_like(q), step.cu_seqlens.tolist()
        for row, context in enumerate(step.context_lengths.tolist()):
            new = slice(starts[row], starts[row + 1])
            keys, values = cache.row(row, context)  # each [heads, context, dim]
            keys, values = dequantise_kv(keys, cache.k_scale), dequantise_kv(values, cache.v_scale)  # float32
            mask = self._mask(step.positions[new, None], context)  # [heads or none, new, context]
            attended = F.scaled_dot_product_attention(q[new].float().transpose(0, 1), keys, values, mask)
            out[new] = attended.transpose(0, 1)
        return out.flatten(1)

    def _mask(self, positions: Tensor, context: int) -> Tensor:
        """SDPA's attn_mask: hides keys after the query's position, and adds ALiBi's bias slope * (key - query).

        positions: the queries', [..., 1] -> [..., context]; with ALiBi broadcast over the heads
        """
        distance = torch.arange(context, device=positions.device) - positions
        if self.slopes is None:
            return distance <= 0
        return (self.slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)

    def silu_mul(self, gate_up):
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def all_reduce(self, x):
        return self.comm.all_reduce(x)

    def select_rows(self, x, rows):
        return x[rows]

    def head(self, x, weight: Weight, vocab_size: int):
        return self.comm.all_gather(linear(x, weight, torch.float32, self.comm))[:, :vocab_size]


class ReferenceExecutor:
    """executors.base.Executor on the CPU."""

    device = torch.device("cpu")
    paged = True

    def __init__(
        self,
        config: ModelConfig,
        quant: QuantConfig,
        weights: ModelWeights,
        comm: Communicator | None = None,
        pool: PoolSettings | None = None,
    ):
        self.config, self.quant, self.weights, self.comm = config, quant, weights, comm or Solo()
        self.pool, self.spec = pool, attention_spec(config, self.comm.rank, self.comm.world_size)
        self.cache = KVCache()

    def reset(self, rows: int, capacity: int) -> None:
        if rows <= self.cache.rows and capacity <= self.cache.capacity:
            return self.cache.forget()
        self.cache = KVCache()  # frees the old cache before the new one is allocated
        self.cache = KVCache.allocate(self.weights, self.quant, self.spec, rows, capacity, self.comm, self.pool)
        self.ops = self.make_ops(self.cache.capacity)

    def make_ops(self, capacity: int) -> ReferenceOps:
        return ReferenceOps(self.spec, self.comm, capacity)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        return forward(self.ops, self.config, self.weights, self.cache.layers, self.spec, step)
