"""Decode and prefill on the CPU, every precision beside transformers' generate and llama.cpp where it is installed.

All sides have the same shapes, threads, prompt and steps, and take turns; random weights, whose values do not matter to
the time.  llama.cpp's q8_0 and q4_0 stand beside INT8 and INT4 in groups of 32, on both sides with lm_head quantised.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

import weight
from baichuan.config import BuildConfig, ModelConfig, QuantConfig, SamplingConfig
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.generation.session import Session
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.modeling import BaichuanForCausalLM
from baichuan.records import ModelWeights, Step
from benchmarks.llama_cpp_peer import GGUF_TYPES, LlamaCpp, installed, write_gguf
from benchmarks.random_weights import PRECISIONS, RandomWeights

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
PROMPT = list(range(5, 69))
PREFILL = list(range(5, 517))
BATCH = 8
CASES = {  # dtype and quantisation of each precision
    "float32": ("float32", QuantConfig()),
    "float16": ("float16", QuantConfig()),
    "bfloat16": ("bfloat16", QuantConfig()),
    "int8": ("float16", replace(PRECISIONS["int8"], quantize_lm_head=True)),
    "int4": ("float16", replace(PRECISIONS["int4"], quantize_lm_head=True)),
    "smooth_quant_per_token": ("float16", PRECISIONS["smooth_quant_per_token"]),
    "fp8": ("float16", PRECISIONS["fp8"]),
}


def small_model(args: argparse.Namespace, dtype: str) -> ModelConfig:
    """A model with the 7B's proportions at --hidden_size; its intermediate size is a multiple of 128."""
    hidden = args.hidden_size
    inter, vocab = -(-hidden * 43 // 16 // 128) * 128, hidden * 125 // 8
    return ModelConfig("v1_7b", hidden, args.num_layers, hidden // 128, inter, vocab, dtype=dtype)


def decode(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    for precision in args.precision:
        with ExitStack() as stack:
            sides = {"ours": ours(args, precision, stack)}
            if precision in ("float32", "float16", "bfloat16"):
                sides["transformers"] = transformers(args, precision)
            if precision in GGUF_TYPES and installed():
                sides["llama.cpp"] = llama_cpp(args, precision, stack)
            best: dict[tuple[str, str], float] = {}
            for _ in range(args.rounds + 1):  # the best round counts; the first also warms up
                for side, measure in sides.items():
                    for what, rate in measure().items():
                        best[side, what] = max(rate, best.get((side, what), 0))
        report(precision, best)
        gc.collect()


def report(precision: str, best: dict[tuple[str, str], float]) -> None:
    """One line: our rates, and their ratios to each peer's."""
    parts = []
    for (side, what), rate in best.items():
        if side == "ours":
            peers = [
                f"{other} {theirs:.1f}: {rate / theirs:.2f}"
                for (other, same), theirs in best.items()
                if other != "ours" and same == what
            ]
            parts.append(f"{what} {rate:.1f} tok/s" + (f" ({', '.join(peers)})" if peers else ""))
    share = best["ours", f"batch {BATCH}"] / (BATCH * best["ours", "decode"])
    print(f"{precision}: {'; '.join(parts)}; {share:.2f} of {BATCH} x batch 1", flush=True)


def ours(args: argparse.Namespace, precision: str, stack: ExitStack) -> Callable[[], dict[str, float]]:
    dtype, quant = CASES[precision]
    model = small_model(args, dtype)
    executor = CpuExecutor(model, quant, mapped(RandomWeights(model, quant, "cpu").rank(), stack))
    session = Session(executor, model, BuildConfig(max_batch_size=BATCH))

    def measure() -> dict[str, float]:
        rates = {}
        for what, batch in (("decode", 1), (f"batch {BATCH}", BATCH)):
            session.generate([PROMPT] * batch, GREEDY, args.steps)
            rates[what] = batch * session.timing.decode_steps / session.timing.decode_s
        executor.reset(1, len(PREFILL))
        start = time.perf_counter()
        executor.forward(Step.of([PREFILL]))
        return rates | {f"prefill of {len(PREFILL)}": len(PREFILL) / (time.perf_counter() - start)}

    return measure


def mapped(weights: ModelWeights, stack: ExitStack) -> ModelWeights:
    """The weights in a file that is mapped, as an engine's and llama.cpp's are: its pages are larger than memory's."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "weights")
    torch.save(weights, path)
    return torch.load(path, mmap=True, weights_only=False)


def transformers(args: argparse.Namespace, precision: str) -> Callable[[], dict[str, float]]:
    model = small_model(args, precision)
    peer = BaichuanForCausalLM(BaichuanConfig.of(model)).to(getattr(torch, precision)).eval()
    ids = torch.tensor([PROMPT])

    @torch.inference_mode()
    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        peer.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start

    def measure() -> dict[str, float]:  # the time of one token is the prefill's
        return {"decode": (args.steps - 1) / (seconds(args.steps) - seconds(1))}

    return measure


def llama_cpp(args: argparse.Namespace, precision: str, stack: ExitStack) -> Callable[[], dict[str, float]]:
    folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = gguf_path(folder, small_model(args, "float32"), precision)
    peer = LlamaCpp(path, 1024)
    stack.callback(peer.close)

    def measure() -> dict[str, float]:
        _, step = peer.times(PROMPT, args.steps)
        # A chunk of one sequence stands for a batch, with the logits of one token.
        batch = min(peer.chunk(PROMPT[:BATCH]) for _ in range(args.steps))
        prefill, _ = peer.times(PREFILL, 1)
        rates = {"decode": 1 / step, f"batch {BATCH}": BATCH / batch}
        return rates | {f"prefill of {len(PREFILL)}": len(PREFILL) / prefill}

    return measure


def gguf_path(folder: Path, model: ModelConfig, precision: str) -> Path:
    """The model with dummy weights as llama.cpp's file in the folder, written unless it is there."""
    path = folder / f"{model.hidden_size}x{model.num_layers}_{precision}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = weight.WeightSource().checkpoint(model, 1)
        write_gguf(path, model, {name: each.read(0, each.shape[0]) for name, each in tensors.items()}, precision)
    return path
