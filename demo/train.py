"""Train the demo's checkpoint: a tiny Baichuan that knows the lessons of demo/lessons.py, in the hub's format.

python demo/train.py --output_dir demo_output/checkpoint
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from baichuan.cli.common import Parser, add_model_version, run_script
from baichuan.config import VERSIONS, ModelConfig
from baichuan.errors import ConfigError
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.modeling import BaichuanForCausalLM
from baichuan.parallel.comm import Communicator
from baichuan.text.tokenizer import MODEL_NAME, Tokenizer
from baichuan.util.progress import Progress
from demo import lessons

logger = logging.getLogger("baichuan.demo")

VOCAB_SIZE = 1600
SIZES: dict[bool, dict[str, Any]] = {  # by VERSIONS' rotary
    True: dict(hidden_size=256, num_heads=8),
    False: dict(hidden_size=320, num_heads=10),
}
PEAK_LEARNING_RATE = 4e-3
SEED = 0
STEPS = {True: 240, False: 120}  # by VERSIONS' rotary; with RoPE training takes longer
IGNORED = -100  # cross_entropy's label for padding


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_model_version(parser, "which Baichuan it becomes", "v1_13b")
    parser.add_argument("--output_dir", required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, help=f"optimiser steps (default: {STEPS[False]}, of a 7B {STEPS[True]})")
    return run_script(parser, argv, train)


def train(args: argparse.Namespace, comm: Communicator) -> int:
    output = Path(args.output_dir)
    if output.exists():
        raise ConfigError(f"output_dir {output} exists; remove it, or name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        articles = lessons.read_articles()
        (staged / MODEL_NAME).write_bytes(train_tokenizer(articles, VERSIONS[args.model_version].norm_head))
        batches = lessons.batches(articles, Tokenizer(staged), SEED)
        steps = STEPS[VERSIONS[args.model_version].rotary] if args.steps is None else args.steps
        config = model_config(args.model_version)
        save(fit(config, itertools.islice(batches, steps), steps), config, staged)
        staged.chmod(0o755)
        os.rename(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return 0


def train_tokenizer(articles: list[dict], second: bool, fillers: int = 0) -> bytes:
    """A SentencePiece model with the released ones' special ids; v2's puts no space before the text.

    fillers: symbols that no text has, for a vocabulary of a released model's size.
    """
    reserved = [*range(200, 285), *range(1, 111)]  # <reserved_106> becomes 195, <reserved_107> becomes 196
    unused = [f"<filler_{n}>" for n in range(fillers)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lessons.training_texts(articles)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE + fillers,
        byte_fallback=True,
        add_dummy_prefix=not second,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<SEP>", "<CLS>", *(f"<reserved_{n}>" for n in reserved), *unused],
        minloglevel=2,
    )
    return model.getvalue()


def model_config(model_version: str) -> ModelConfig:
    """The demo's size of the version, in the type in which the released one is stored."""
    sizes = SIZES[VERSIONS[model_version].rotary]
    dtype = "float16" if model_version == "v1_7b" else "bfloat16"
    return ModelConfig(model_version, num_layers=3, intermediate_size=512, vocab_size=VOCAB_SIZE, dtype=dtype, **sizes)


def fit(config: ModelConfig, batches: Iterator[list[list[int]]], steps: int) -> BaichuanForCausalLM:
    """A model trained on `steps` batches of token ids; reports the loss as it goes."""
    torch.manual_seed(SEED)
    model = BaichuanForCausalLM(BaichuanConfig.of(config)).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.15)
    with Progress("training", steps, "step", interval_s=5.0) as progress:
        for batch in batches:
            tensors = [torch.tensor(ids) for ids in batch]
            ids = pad_sequence(tensors, batch_first=True)
            labels = pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
            loss = model(ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.advance()
    logger.info("trained %d steps, last loss %.4f", steps, loss.item())
    return model.eval()


def save(model: BaichuanForCausalLM, config: ModelConfig, folder: Path) -> None:
    """The hub's files beside tokenizer.model: two shards with an index, as the released version stores them."""
    in_safetensors = config.model_version == "v1_7b"
    name = "model{}.safetensors" if in_safetensors else "pytorch_model{}.bin"
    dtype = getattr(torch, config.dtype)
    tensors = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    keys = list(tensors)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    names = [name.format(f"-{number:05d}-of-{len(shards):05d}") for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        values = {key: tensors[key] for key in shard}
        if in_safetensors:
            save_file(values, folder / file, metadata={"format": "pt"})
        else:
            torch.save(values, folder / file)
    size = sum(value.nbytes for value in tensors.values())
    weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    write_json(folder / (name.format("") + ".index.json"), {"metadata": {"total_size": size}, "weight_map": weight_map})
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": lessons.EOS_ID}
    write_json(folder / "config.json", {**config_values(config), **ids})
    roles = {"user_token_id": lessons.ROLES.user_id, "assistant_token_id": lessons.ROLES.assistant_id}
    write_json(folder / "generation_config.json", {**ids, **roles})


def config_values(model: ModelConfig) -> dict:
    """config.json as the hub has it, without the special ids."""
    return {
        "architectures": [model.version.architecture],
        "model_type": "baichuan",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "hidden_act": model.hidden_act,
        "rms_norm_eps": model.rms_norm_eps,
        "torch_dtype": model.dtype,
        "tie_word_embeddings": False,
        **dict.fromkeys(model.version.length_keys, model.max_positions),
    }


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
