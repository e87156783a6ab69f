"""The CPU path against its ceilings, each ratio from one run: python benchmarks/bench_cpu.py

decode    tokens/s of the engine over those of transformers' generate, same weights, threads and prompt
open      seconds from engine folder to first token, over reading the file once
build     seconds to build an engine of dummy weights, over writing the same bytes with dd; peak anonymous memory
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weight
from baichuan.config import PRESETS, BuildConfig, ModelConfig, QuantConfig, SamplingConfig
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.runtime import open_session
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.generation.session import Session
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.modeling import BaichuanForCausalLM
from baichuan.parallel.comm import Solo
from baichuan.util.processes import CONTEXT
from baichuan.weights.rank_tensors import total_bytes

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
PROMPT = list(range(5, 69))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), help="all if none is given")
    parser.add_argument("--hidden_size", type=int, default=1280, help="of the decode and open model, 7B-shaped")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--build_version", choices=tuple(PRESETS), default="v1_7b")
    args = parser.parse_args(argv)
    for part in args.parts or PARTS:
        process = CONTEXT.Process(target=PARTS[part], args=(args,))  # what one leaves in memory is not the next one's
        process.start()
        process.join()
        if process.exitcode:
            return process.exitcode
    return 0


def small_model(args: argparse.Namespace, dtype: str) -> ModelConfig:
    """The 7B's proportions at another width."""
    hidden = args.hidden_size
    inter, vocab = hidden * 43 // 16, hidden * 125 // 8
    return ModelConfig("v1_7b", hidden, args.num_layers, hidden // 128, inter, vocab, dtype=dtype)


def decode(args: argparse.Namespace) -> None:
    for dtype in ("float32", "bfloat16"):
        model, source = small_model(args, dtype), weight.WeightSource()
        tensors = {name: each.read(0, each.shape[0]) for name, each in source.checkpoint(model, 1).items()}
        peer = BaichuanForCausalLM(BaichuanConfig.of(model)).to(getattr(torch, dtype)).eval()
        peer.load_state_dict(tensors)
        weights = weight.load_rank(source, model, QuantConfig())
        session = Session(ReferenceExecutor(model, QuantConfig(), weights), model, BuildConfig())
        ours, theirs = [], []
        for _ in range(4):  # the first of each warms up
            ours.append(engine_ms(session, args.steps))
            theirs.append(peer_ms(peer, args.steps))
        engine, transformers = min(ours[1:]), min(theirs[1:])
        ratio = transformers / engine
        print(f"decode {dtype}: {engine:.2f} ms per step, transformers {transformers:.2f} ms: ratio {ratio:.2f}")


def engine_ms(session, steps: int) -> float:
    session.generate([PROMPT], GREEDY, steps)
    return 1e3 * session.timing.decode_s / session.timing.decode_steps


@torch.inference_mode()
def peer_ms(peer, steps: int) -> float:
    """A step of generate: the time of `steps` tokens less that of one, which is the prefill's."""
    ids = torch.tensor([PROMPT])

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        peer.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start

    return 1e3 * (seconds(steps) - seconds(1)) / (steps - 1)


def opening(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = small_model(args, "float32")
        engine = build(Path(folder), model)
        path = engine.folder / next(iter(engine.files))
        drop_cache(path)
        start = time.perf_counter()
        read(path)
        reading = time.perf_counter() - start
        drop_cache(path)
        start = time.perf_counter()
        open_session(Path(folder), Solo()).generate([PROMPT[:1]], GREEDY, 1)
        ours = time.perf_counter() - start
    print(f"open to first token: {ours:.2f} s, reading the file once {reading:.2f} s: ratio {ours / reading:.2f}")


def building(args: argparse.Namespace) -> None:
    model = PRESETS[args.build_version]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        size = total_bytes(weight.rank_tensors(weight.WeightSource(), model, QuantConfig(), 0, 1))
        dd_seconds(folder, size)  # a virtual machine may first have to get the memory of the page cache from its host
        peak = PeakAnonymous()
        start = time.perf_counter()
        engine = build(Path(folder), model)
        ours, anonymous = time.perf_counter() - start, peak.stop()
        for name in engine.files:
            (Path(folder) / name).unlink()
        peer = dd_seconds(folder, size)
    print(
        f"build {args.build_version}: {size / 1e9:.2f} GB in {ours:.1f} s, dd {peer:.1f} s: ratio {ours / peer:.2f}; "
        f"peak anonymous memory {anonymous / 1e9:.2f} GB"
    )


def dd_seconds(folder: str, size: int) -> float:
    """Seconds in which dd writes a file of that size, to the disk; the file is deleted."""
    path, start = Path(folder, "dd"), time.perf_counter()
    count = size // (16 << 20)
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={count}", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def build(folder: Path, model: ModelConfig):
    tensors = partial(weight.rank_tensors, weight.WeightSource(), model, QuantConfig(), tp_size=1)
    return build_engine(BuildRequest(folder, model, QuantConfig(), BuildConfig(), tensors))


def read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(16 << 20):
            pass


def drop_cache(path: Path) -> None:
    """Forget the file's pages, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakAnonymous:
    """The largest anonymous memory of this process until stop(), in bytes, seen every 20 ms."""

    def __init__(self):
        self._peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            status = Path("/proc/self/status").read_text()
            kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            self._peak = max(self._peak, kilobytes << 10)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


PARTS = {"decode": decode, "open": opening, "build": building}

if __name__ == "__main__":
    sys.exit(main())
