"""A random LoRA adapter of every matrix of the layers, in PEFT's format:

python benchmarks/random_adapter.py --model_version v1_7b --output_dir FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from baichuan.cli.common import Parser, add_model_version, run_script
from baichuan.config import ModelConfig
from baichuan.parallel.comm import Communicator
from baichuan.weights.shard import hub_shapes
from benchmarks.random_checkpoint import model_of
from demo.train import write_json

RANK, ALPHA = 8, 16
STRENGTH = 0.01  # standard deviation of lora_B, as after a short training


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_model_version(parser, "version whose sizes are taken", default="v1_7b")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--small", action="store_true", help="the demo's size instead of the version's own")
    return run_script(parser, argv, write)


def write(args: argparse.Namespace, comm: Communicator) -> int:
    write_adapter(args.output_dir, model_of(args.model_version, args.small))
    return 0


def write_adapter(folder: Path, model: ModelConfig) -> None:
    """Write an adapter of the model's shapes, with changes as small as after a short training."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, targets = {}, set()
    for name, shape in hub_shapes(model).items():
        if name.endswith("_proj.weight") or name.endswith("W_pack.weight"):
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * STRENGTH
            targets.add(name.split(".")[-2])
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(targets)}
    write_json(folder / "adapter_config.json", settings)


if __name__ == "__main__":
    sys.exit(main())
