"""The reference executor: every op as its plain formula in PyTorch; the other executors are tested against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.reference_linear import linear
from baichuan.executors.kv_cache import KVCache
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
        if step.max_new_tokens == 1:
            return self._attend_decode(q, k, v, cache, step)
        starts = step.cu_seqlens.tolist()
        for row, context in enumerate(step.context_lengths.tolist()):
            new = slice(starts[row], starts[row + 1])
            past = context - (new.stop - new.start)
            cache.k[row, :, past:context] = quantise_kv(k[new], cache.k_scale, cache.k.dtype).transpose(0, 1)
            cache.v[row, :, past:context] = quantise_kv(v[new], cache.v_scale, cache.v.dtype).transpose(0, 1)
        return self.attend_stored(q, cache, step)

    def attend_stored(self, q: Tensor, cache: LayerCache, step: Step) -> Tensor:
        """attention of rotated queries over keys and values that are already cached.  q: [num_tokens, heads, dim]"""
        starts = step.cu_seqlens.tolist()
        out = torch.empty_like(q)
        for row, context in enumerate(step.context_lengths.tolist()):
            new = slice(starts[row], starts[row + 1])
            keys = dequantise_kv(cache.k[row, :, :context], cache.k_scale)  # [heads, context, dim] float32
            values = dequantise_kv(cache.v[row, :, :context], cache.v_scale)
            mask = self._mask(step.positions[new, None], context)  # [heads or none, new, context]
            attended = F.scaled_dot_product_attention(q[new].float().transpose(0, 1), keys, values, mask)
            out[new] = attended.transpose(0, 1)
        return out.flatten(1)

    def _attend_decode(self, q, k, v, cache: LayerCache, step: Step):
        """attention for one new token per sequence, all sequences at once.  q, k, v: [batch_size, heads, dim]"""
        rows = torch.arange(step.batch_size, device=q.device)
        cache.k[rows, :, step.positions] = quantise_kv(k, cache.k_scale, cache.k.dtype)
        cache.v[rows, :, step.positions] = quantise_kv(v, cache.v_scale, cache.v.dtype)
        context = int(step.context_lengths.max())
        keys = dequantise_kv(cache.k[: step.batch_size, :, :context], cache.k_scale)  # [batch, heads, context, dim]
        values = dequantise_kv(cache.v[: step.batch_size, :, :context], cache.v_scale)
        alone = self.slopes is None and step.batch_size == 1  # no mask and no bias: its query sees every key
        mask = None if alone else self._mask(step.positions[:, None, None, None], context)  # [batch, heads, 1, context]
        return F.scaled_dot_product_attention(q.float()[:, :, None], keys, values, mask).flatten(1).to(q.dtype)

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

    def __init__(
        self, config: ModelConfig, quant: QuantConfig, weights: ModelWeights, comm: Communicator | None = None
    ):
        self.config, self.quant, self.weights, self.comm = config, quant, weights, comm or Solo()
        self.spec = attention_spec(config, self.comm.rank, self.comm.world_size)
        self.cache = KVCache()

    def reset(self, batch_size: int, capacity: int) -> None:
        self.cache = KVCache()  # frees the old cache before the new one is allocated
        self.cache = KVCache.allocate(self.weights, self.quant, self.spec, batch_size, capacity)
        self.ops = self.make_ops(capacity)

    def make_ops(self, capacity: int) -> ReferenceOps:
        return ReferenceOps(self.spec, self.comm, capacity)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        return forward(self.ops, self.config, self.weights, self.cache.layers, self.spec, step)
