"""A small LoRA adapter for a checkpoint, in PEFT's format but without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from baichuan.weights.hub.config_json import read_json_object


def write_adapter(folder: Path, checkpoint: Path, rank: int = 2) -> Path:
    """It changes o_proj in every layer."""
    values = read_json_object(checkpoint / "config.json", 1 << 20)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(values["num_hidden_layers"]):
        name, hidden = f"base_model.model.model.layers.{layer}.self_attn.o_proj", values["hidden_size"]
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden
        tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, rank, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
