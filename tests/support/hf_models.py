"""Transformers models: those of the golden checkpoints, and smaller ones of random weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import goldens
import torch
from torch import Tensor

from baichuan.config import PRESETS
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM, load_hf_model

SMALL = dict(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, vocab_size=101)


@cache
def model(version: str, dtype: str = "float32") -> BaichuanForCausalLM:
    return load_hf_model(goldens.checkpoint(version), version, dtype)


def ids(version: str, length: int) -> Tensor:
    return goldens.golden(version)[f"ids_{length}"][None]


@torch.no_grad()
def logits(model: BaichuanForCausalLM, tokens: Tensor, **inputs) -> Tensor:
    return model(tokens, **inputs).logits


def small(version: str) -> BaichuanForCausalLM:
    torch.manual_seed(0)
    return BaichuanForCausalLM(BaichuanConfig.of(replace(PRESETS[version], dtype="float32", **SMALL))).eval()
