"""What quantisation changes, ours beside llama.cpp's of equal bits: KL from each side's own float32, same weights.

The weights are made up, as are the prompts: the figures compare roundings, not the quality of a language model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import weight
from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.records import Step
from benchmarks.cpu_decode import CASES, gguf_path, small_model
from benchmarks.llama_cpp_peer import LlamaCpp, installed

PROMPTS, LENGTH = 16, 48


def kl(args: argparse.Namespace) -> None:
    if not installed():
        raise SystemExit("nothing to compare with; pip install llama-cpp-python gguf")
    torch.set_num_threads(args.threads)
    prompts = torch.randint(5, 20000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        theirs = llama_logits(gguf_path(folder, small_model(args, "float32"), "float32"), prompts)
        ours = our_logits(small_model(args, "float32"), QuantConfig(), prompts)
        print(f"float32, ours from llama.cpp's: KL {divergence(theirs, ours):.2g}", flush=True)
        for precision in ("int8", "int4"):
            dtype, quant = CASES[precision]
            model = small_model(args, dtype)
            mine = divergence(ours, our_logits(model, quant, prompts))
            peer = divergence(theirs, llama_logits(gguf_path(folder, model, precision), prompts))
            print(f"{precision}: KL {mine:.2g}, llama.cpp {peer:.2g}", flush=True)


def our_logits(model: ModelConfig, quant: QuantConfig, prompts: Sequence[Sequence[int]]) -> Tensor:
    """After each prompt's last token, [prompts, vocab_size]."""
    executor = CpuExecutor(model, quant, weight.load_rank(weight.WeightSource(), model, quant))

    def last(prompt: Sequence[int]) -> Tensor:
        executor.reset(1, LENGTH)
        return executor.forward(Step.of([prompt]))

    return each(prompts, last)


def llama_logits(path: Path, prompts: Sequence[Sequence[int]]) -> Tensor:
    peer = LlamaCpp(path, 512)
    try:
        return each(prompts, peer.logits)
    finally:
        peer.close()


def each(prompts: Sequence[Sequence[int]], logits: Callable[[Sequence[int]], Tensor]) -> Tensor:
    return torch.stack([logits(prompt).flatten().double() for prompt in prompts])


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over the prompts, in nats."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
