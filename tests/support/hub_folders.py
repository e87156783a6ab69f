"""Small checkpoint folders in the hub's format, in a temporary place where a test can damage them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from baichuan.config import PRESETS, VERSIONS, ModelConfig
from baichuan.weights.dummy import dummy_checkpoint

SIZES = dict(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, vocab_size=50)
SINGLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
SHARD = {"safetensors": "model-{:05d}-of-{:05d}.safetensors", "bin": "pytorch_model-{:05d}-of-{:05d}.bin"}
both_formats = pytest.mark.parametrize("form", SINGLE)


def small_config(version: str, dtype: str = "float16") -> ModelConfig:
    return replace(PRESETS[version], dtype=dtype, **SIZES)


def hub_values(config: ModelConfig) -> dict:
    """config.json as the hub has it."""
    lengths = dict.fromkeys(config.version.length_keys, config.max_positions)
    return {
        "architectures": [VERSIONS[config.model_version].architecture],
        "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
        "model_type": "baichuan",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab_size,
        **lengths,
    }


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Dummy weights: a new dict of tensors that are not to be written to."""
    return dict(_tensors(config))


@cache
def _tensors(config: ModelConfig) -> dict[str, Tensor]:
    return {name: source.read(0, source.shape[0]).clone() for name, source in dummy_checkpoint(config).items()}


def save(path: Path, values: Mapping[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(dict(values), path)
    else:
        torch.save(dict(values), path)


def write_weights(folder: Path, values: Mapping[str, Tensor], form: str, shards: int = 0) -> dict[str, str]:
    """The tensors in one file, or in `shards` files with an index; returns the index's weight_map."""
    if not shards:
        save(folder / SINGLE[form], values)
        return {}
    where = {name: SHARD[form].format(1 + i % shards, shards) for i, name in enumerate(values)}
    for shard in set(where.values()):
        save(folder / shard, {name: values[name] for name in values if where[name] == shard})
    write_index(folder, form, where)
    return where


def write_index(folder: Path, form: str, where: Mapping[str, object]) -> None:
    (folder / f"{SINGLE[form]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
