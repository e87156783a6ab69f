"""A checkpoint of random weights in the hub's format, at any size, with a tokenizer of its vocabulary's size:

python benchmarks/random_checkpoint.py --model_version v1_7b --output_dir FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from baichuan.cli.common import Parser, add_model_version, run_script
from baichuan.config import PRESETS, VERSIONS, ModelConfig
from baichuan.parallel.comm import Communicator
from baichuan.text.tokenizer import MODEL_NAME
from baichuan.weights.dummy import dummy_checkpoint
from benchmarks.random_gptq import SETTINGS, gptq_tensors
from demo.lessons import EOS_ID, ROLES, read_articles
from demo.train import VOCAB_SIZE, config_values, train_tokenizer, write_json

SMALL: dict[str, Any] = dict(num_layers=3, hidden_size=256, num_heads=8, intermediate_size=512, vocab_size=VOCAB_SIZE)
SHARDS = {True: 2, False: 9}  # number of shards by --small


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_model_version(parser, "version whose sizes are taken", default="v1_7b")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the checkpoint")
    parser.add_argument("--small", action="store_true", help="the demo's size instead of the version's own")
    parser.add_argument(
        "--gptq", action="store_true", help="the layers' matrices in 4 bits, as GPTQ's tools write them"
    )
    return run_script(parser, argv, write)


def model_of(version: str, small: bool) -> ModelConfig:
    return replace(PRESETS[version], **SMALL) if small else PRESETS[version]


def write(args: argparse.Namespace, comm: Communicator) -> int:
    version, folder = VERSIONS[args.model_version], args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model = model_of(args.model_version, args.small)
    articles = read_articles()
    tokenizer = train_tokenizer(articles, version.norm_head, model.vocab_size - VOCAB_SIZE)
    (folder / MODEL_NAME).write_bytes(tokenizer)
    in_safetensors = args.gptq or args.model_version == "v1_7b"  # as the released version is stored
    model = replace(model, dtype="float16" if in_safetensors else "bfloat16")
    name = "model{}.safetensors" if in_safetensors else "pytorch_model{}.bin"
    weight_map: dict[str, str] = {}
    for file, tensors in shards(model, name, SHARDS[args.small], args.gptq):
        save_file(tensors, folder / file) if in_safetensors else torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / (name.format("") + ".index.json"), {"metadata": {}, "weight_map": weight_map})
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS_ID}
    roles = {"user_token_id": ROLES.user_id, "assistant_token_id": ROLES.assistant_id}
    write_json(folder / "generation_config.json", {**ids, **roles})
    quantised = {"quantization_config": SETTINGS} if args.gptq else {}
    write_json(folder / "config.json", {**config_values(model), **ids, **quantised})
    return 0


def shards(model: ModelConfig, name: str, count: int, gptq: bool) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(file name, tensors), one shard in memory at a time."""
    sources = dummy_checkpoint(model)
    total, done, number = sum(torch.Size(s.shape).numel() for s in sources.values()), 0, 1
    tensors: dict[str, torch.Tensor] = {}
    for tensor_name, source in sources.items():
        if gptq and ".layers." in tensor_name and len(source.shape) == 2:
            tensors |= gptq_tensors(tensor_name, source, seed=done)
        else:
            tensors[tensor_name] = source.read(0, source.shape[0]).clone()  # dummy tensors may share memory
        done += torch.Size(source.shape).numel()
        if done * count >= number * total:
            yield name.format(f"-{number:05d}-of-{count:05d}"), tensors
            number, tensors = number + 1, {}


if __name__ == "__main__":
    sys.exit(main())
