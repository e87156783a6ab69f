"""The checkpoints that tests/data/imported/make.py had other tools write: where they are, read, and changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.config_json import read_model_config

FOLDER = Path(__file__).parents[1] / "data/imported"
LAYER = "model.layers.0."
MATRICES = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def model_of(folder):
    return read_model_config(folder, "v1_7b", "float32")


def dense(folder, block=7):
    """Every quantised matrix as it is read, block of rows by block of rows."""
    checkpoint = open_checkpoint(folder, model_of(folder))
    found = {}
    for module in MATRICES:
        source = checkpoint[f"{LAYER}{module}.weight"]
        blocks = range(0, source.shape[0], block)
        found[module] = torch.cat([source.read(a, min(a + block, source.shape[0])) for a in blocks])
        assert found[module].dtype == source.dtype == torch.float32
    return found


def changed(name, folder, settings=None, tensors=None):
    """A copy of the checkpoint with some settings, and with its tensors as tensors(by name) makes them."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder
