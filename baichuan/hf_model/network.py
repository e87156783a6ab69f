"""What the four versions compute, as PyTorch modules whose weights have the hub's names.

Independent of ops.py, decoder.py and the executors, so that an error there cannot hide here; and of transformers, which
takes seconds to import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baichuan.config import ModelConfig, Version
from baichuan.model.position import alibi_slopes, rope_at, rotate


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(self.weight.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.num_heads = layer, config.num_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, causal: bool, cache
    ) -> Tensor:
        """x: [batch, length, hidden]; rope: cos and sin, each [batch, length, head_dim / 2]; mask: SDPA's attn_mask."""
        qkv = self.W_pack(x).unflatten(-1, (3, self.num_heads, -1))  # [batch, length, 3, heads, head_dim]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_dim]
        if rope is not None:
            q, k = (rotate(each, *rope).to(x.dtype) for each in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if mask is not None and mask.is_floating_point():
            q, k, v = q.float(), k.float(), v.float()  # SDPA would round the bias to a lower precision's dtype
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config)


class NormHead(nn.Linear):
    """x @ (weight / ‖weight‖₂ per row)ᵀ, normalised in float32: in every call with gradients, else once per weight."""

    _normalised: Tensor | None = None
    _key: tuple | None = None  # identifies the weight that _normalised was computed from

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._normalise() if torch.is_grad_enabled() else self._cached())

    def _normalise(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1).to(self.weight.dtype)

    def _cached(self) -> Tensor:
        weight = self.weight
        key = (weight.data_ptr(), weight.device, weight.dtype, None if weight.is_inference() else weight._version)
        if self._normalised is None or key != self._key:
            self._normalised, self._key = self._normalise(), key
        return self._normalised


class Network:
    """The modules `model` and `lm_head` of a torch.nn.Module, and what they make of hidden states."""

    model: Decoder  # these from build() on
    lm_head: nn.Linear
    version: Version

    def build(self, config: ModelConfig) -> None:
        self.version = config.version
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope = config.rope_theta, config.rope_factor
        self.model = Decoder(config)
        head = NormHead if self.version.norm_head else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)

    def states(
        self, x: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, cache: Any = None
    ) -> list[Tensor]:
        """x, what each layer but the last makes of it, and the final norm of the last's, each [batch, length, hidden].

        attention_mask, position_ids, cache: as in BaichuanForCausalLM.forward
        """
        attention_inputs = self._attention_inputs(x, attention_mask, position_ids, cache)
        states = [x]
        for layer in self.model.layers:
            x = layer(x, *attention_inputs, cache)
            states.append(x)
        return [*states[:-1], self.model.norm(x)]

    def _attention_inputs(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache):
        """rope, mask and causal of Attention.forward, the same in every layer."""
        batch, length = x.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if attention_mask is None:
            attention_mask = x.new_ones(batch, past + length, dtype=torch.bool)
        if attention_mask.shape != (batch, past + length):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not {(batch, past + length)}")
        real = attention_mask.bool()
        rope = None
        if self.version.rotary:
            if position_ids is None:
                position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            rope = rope_at(position_ids, self.head_dim, *self.rope)
        # Slots for keys: a static cache has empty ones.
        slots = cache.get_mask_sizes(length, 0)[0] if cache is not None else length
        if self.version.rotary and slots == past + length and length in (1, slots) and bool(real.all()):
            return rope, None, length > 1
        keys = torch.arange(slots, device=x.device)
        queries = torch.arange(past, past + length, device=x.device)[:, None]
        allowed = F.pad(real, (0, slots - past - length))[:, None, None] & (keys <= queries)
        allowed = allowed | (keys == queries)  # padding attends to itself, because softmax over no key is NaN
        if self.version.rotary:
            return rope, allowed, False  # [batch, 1, length, slots]
        slopes = alibi_slopes(self.num_heads).to(x.device)[:, None, None]
        return None, (slopes * (keys - queries)).where(allowed, -torch.inf), False  # [batch, heads, length, slots]
