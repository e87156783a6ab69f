"""A checkpoint rewritten in GPTQ's layout, quantised to the nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from baichuan.quant.weight_only import quantise_int4, unpack_int4

GROUP_SIZE = 32
PROJECTIONS = ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_gptq(folder: Path, checkpoint: Path) -> Path:
    """The checkpoint in `folder`, its layers' matrices in 4 bits without zeros, in the format's first version."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False}
    values = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {}
    for file in [*folder.glob("pytorch_model*")]:
        tensors |= torch.load(file, weights_only=True) if file.suffix == ".bin" else {}
        file.unlink()
    for name in [name for name in tensors if name.split(".")[-2] in PROJECTIONS]:
        parts = _parts(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _parts(weight: Tensor) -> dict[str, Tensor]:
    packed, scale = quantise_int4(weight, GROUP_SIZE, torch.float16)
    q = unpack_int4(packed).int() + 8  # [out, in]
    words = sum(q[:, place::8].long() << 4 * place for place in range(8))  # [out, in / 8]
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    zeros = torch.full((scale.shape[1], scale.shape[0] // 8), 0x77777777, dtype=torch.int32)  # 8, less 1
    return {"qweight": words.t(), "qzeros": zeros, "scales": scale.t()}
