"""The four versions as a transformers model: what engines are compared with, calibrated on, and the demo trains.

Independent of ops.py, decoder.py and the executors, so that an error there cannot hide here.  After register(),
AutoModelForCausalLM.from_pretrained(folder) reads a checkpoint in the hub's format and runs none of its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from baichuan.config import ModelConfig
from baichuan.errors import UnsupportedError
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.gpu_loading import read_on_gpu
from baichuan.model.position import alibi_slopes, rope_at, rotate
from baichuan.util.library_logs import through_our_log
from baichuan.weights.hub.adapter import open_merged
from baichuan.weights.hub.checkpoint import IGNORED, read_model_config
from baichuan.weights.source import TensorSource


class RMSNorm(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(self.weight.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer: int):
        super().__init__()
        self.layer, self.num_heads = layer, config.num_attention_heads
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
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: BaichuanConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, *attention_inputs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
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


class BaichuanForCausalLM(PreTrainedModel, GenerationMixin):
    """Raises ConfigError when config does not say which version it is."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keys_to_ignore_on_load_unexpected = [IGNORED.pattern]

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.version = config.version
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope = config.rope_theta, config.rope_factor
        self.model = Decoder(config)
        head = NormHead if self.version.norm_head else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,  # [batch, length]
        attention_mask: Tensor | None = None,  # [batch, cached + length], 0 where padding lies
        position_ids: Tensor | None = None,  # [batch, length]; default: counted from the mask
        cache: Cache | None = None,  # grows by this call's keys and values
        inputs_embeds: Tensor | None = None,  # [batch, length, hidden], instead of input_ids
        labels: Tensor | None = None,  # [batch, length]: the ids themselves, -100 where no loss is wanted
        use_cache: bool | None = None,  # default: unless training
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,  # the name of `cache` before transformers 5.24
        **loss_settings,
    ) -> CausalLMOutputWithPast | tuple:
        if loss_settings.pop("output_attentions", None):
            raise UnsupportedError("output_attentions is not available: attention is fused; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one input; give one of them")
        cache = past_key_values if cache is None else cache
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (use_cache if use_cache is not None else not self.training):
            cache = DynamicCache()
        attention_inputs = self._attention_inputs(x, attention_mask, position_ids, cache)
        states = [x]
        for layer in self.model.layers:
            x = layer(x, *attention_inputs, cache)
            states.append(x)
        states[-1] = x = self.model.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_settings)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(loss, logits, cache, tuple(states) if wanted else None)
        return output if return_dict is not False else output.to_tuple()

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
        slopes = alibi_slopes(self.config.num_attention_heads).to(x.device)[:, None, None]
        return None, (slopes * (keys - queries)).where(allowed, -torch.inf), False  # [batch, heads, length, slots]

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_) -> Tensor | None:
        """generate() asks for the mask of a static cache here; forward makes its own."""
        return attention_mask


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know model_type "baichuan"."""
    AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)


def model_of_tensors(model: ModelConfig, tensors: Mapping[str, TensorSource]) -> BaichuanForCausalLM:
    """The model with these weights, by the hub's names, in eval mode."""
    dtype = getattr(torch, model.dtype)
    return _with_weights(model, {name: source.read(0, source.shape[0]).to(dtype) for name, source in tensors.items()})


def load_hf_model(
    folder: Path | str,
    model_version: str | None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    adapters: Sequence[Path] = (),
) -> BaichuanForCausalLM:
    """The checkpoint in `folder` as a model in eval mode.  model_version: None = what the folder proves.
    adapters: folders of LoRA adapters that are merged into it.

    Its weights come through weights/, as an engine's do, and not through transformers' from_pretrained.
    Raises CheckpointError for an unreadable or incomplete checkpoint, ConfigError for another version's.
    """
    through_our_log("transformers")
    model = read_model_config(Path(folder), model_version, dtype)
    checkpoint = open_merged(Path(folder), model, adapters)
    if torch.device(device).type != "cuda":
        return model_of_tensors(model, checkpoint)
    return _with_weights(model, read_on_gpu(checkpoint, getattr(torch, dtype), torch.device(device)))


def _with_weights(model: ModelConfig, weights: Mapping[str, Tensor]) -> BaichuanForCausalLM:
    with torch.device("meta"):
        result = BaichuanForCausalLM(BaichuanConfig.of(model))
    result.load_state_dict(weights, assign=True)
    return result.eval()
