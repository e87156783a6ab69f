"""The four versions as a transformers model: what summarize.py compares engines with, and what the demo trains.

After register(), AutoModelForCausalLM.from_pretrained(folder) reads a checkpoint in the hub's format and runs none of
its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from baichuan.errors import UnsupportedError
from baichuan.hf_model.config import BaichuanConfig, model_config
from baichuan.hf_model.loading import read_weights, with_weights
from baichuan.hf_model.network import Network
from baichuan.util.library_logs import through_our_log
from baichuan.weights.hub.checkpoint import IGNORED


class BaichuanForCausalLM(Network, PreTrainedModel, GenerationMixin):
    """Raises ConfigError when config does not say which version it is."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keys_to_ignore_on_load_unexpected = [IGNORED.pattern]

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.build(model_config(config))
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
        states = self.states(x, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[-1][:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_settings)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(loss, logits, cache, tuple(states) if wanted else None)
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_) -> Tensor | None:
        """generate() asks for the mask of a static cache here; forward makes its own."""
        return attention_mask


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know model_type "baichuan"."""
    AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)


def load_hf_model(
    folder: Path | str,
    model_version: str | None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    adapters: Sequence[Path] = (),
) -> BaichuanForCausalLM:
    """The checkpoint in `folder` as a transformers model in eval mode, read and refused as by loading.read_weights."""
    through_our_log("transformers")
    model, weights = read_weights(Path(folder), model_version, dtype, torch.device(device), adapters)
    return with_weights(lambda: BaichuanForCausalLM(BaichuanConfig.of(model)), weights)
