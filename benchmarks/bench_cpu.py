"""The CPU path against its ceilings, each ratio from one run: python benchmarks/bench_cpu.py

decode    decode and prefill of every precision beside transformers and llama.cpp, see cpu_decode.py
products  one product by the C kernels and by PyTorch's operators, see cpu_products.py
kl        what INT8 and INT4 change, beside llama.cpp's of equal bits, see cpu_kl.py
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
from baichuan.config import PRESETS, BuildConfig, ModelConfig, QuantConfig
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.runtime import open_session
from baichuan.parallel.comm import Solo
from baichuan.util.processes import CONTEXT
from baichuan.weights.rank_tensors import total_bytes
from benchmarks.cpu_decode import CASES, GREEDY, PROMPT, decode, small_model
from benchmarks.cpu_kl import kl
from benchmarks.cpu_products import products


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), help="all if none is given")
    parser.add_argument("--hidden_size", type=int, default=1280, help="of the decode and open model, 7B-shaped")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=24, help="decode steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each side, of which the best counts")
    parser.add_argument("--precision", nargs="+", choices=tuple(CASES), default=list(CASES), help="of decode")
    parser.add_argument("--folder", type=Path, help="keeps llama.cpp's files, for a later call (default: nowhere)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every side")
    parser.add_argument("--build_version", choices=tuple(PRESETS), default="v1_7b")
    args = parser.parse_args(argv)
    for part in args.parts or PARTS:
        process = CONTEXT.Process(target=PARTS[part], args=(args,))  # each part starts with empty memory
        process.start()
        process.join()
        if process.exitcode:
            return process.exitcode
    return 0


def opening(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        model = small_model(args, "float32")
        engine = build(Path(folder), model)
        path = engine.folder / next(iter(engine.files))
        best = {"reading": float("inf"), "ours": float("inf")}  # the disk's speed changes from one second to the next
        for _ in range(args.rounds):
            for side, run in (("reading", partial(read, path)), ("ours", partial(first_token, Path(folder)))):
                drop_cache(path)
                start = time.perf_counter()
                run()
                best[side] = min(best[side], time.perf_counter() - start)
    ratio = best["ours"] / best["reading"]
    print(
        f"open to first token: {best['ours']:.2f} s, reading the file once {best['reading']:.2f} s: ratio {ratio:.2f}"
    )


def first_token(folder: Path) -> None:
    open_session(folder, Solo()).generate([PROMPT[:1]], GREEDY, 1)


def building(args: argparse.Namespace) -> None:
    model = PRESETS[args.build_version]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        size = total_bytes(weight.rank_tensors(weight.WeightSource(), model, QuantConfig(), 0, 1))
        dd_seconds(folder, size)  # untimed: a virtual machine may get memory for the page cache from its host first
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
    """Drop the file from the page cache, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class PeakAnonymous:
    """The largest anonymous memory of this process until stop(), in bytes, sampled every 20 ms."""

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


PARTS = {"decode": decode, "products": products, "kl": kl, "open": opening, "build": building}

if __name__ == "__main__":
    sys.exit(main())
