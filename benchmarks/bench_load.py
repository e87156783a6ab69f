"""From an engine file in the page cache to a GPU that is ready: python benchmarks/bench_load.py

Writes an engine of dummy weights into a temporary folder, reads it once, and opens it as run.py does, the check of its
SHA-256 included.  Prints GB/s of the file, and beside it what a single thread reads of the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weight
from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, BuildConfig, QuantConfig
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.folder import Engine, verified_meanwhile
from baichuan.engine.runtime import open_session
from baichuan.parallel.comm import Communicator, Solo
from benchmarks.gpu_timing import require_gpu


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model_version", choices=tuple(PRESETS), default="v1_7b", help="model whose shapes are taken")
    parser.add_argument("--num_layers", type=int, default=8, help="of a shortened model; 0 = all")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; default: the system's")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is reported")
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, comm: Communicator) -> int:
    require_gpu("bench_load.py", "bench_cpu.py measures opening an engine on the CPU")
    torch.zeros(1, device="cuda")  # starts CUDA, whose time does not depend on the engine's size
    model = PRESETS[args.model_version]
    model = replace(model, num_layers=args.num_layers or model.num_layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tensors = partial(weight.rank_tensors, weight.WeightSource(), model, QuantConfig(), tp_size=1)
        engine = build_engine(BuildRequest(Path(folder), model, QuantConfig(), BuildConfig(), tensors))
        path = engine.rank_file(0)
        size = path.stat().st_size
        read(path)
        reading = seconds(partial(read, path), args.runs)
        checking = seconds(partial(verify, engine), args.runs)
        opening = seconds(partial(open_and_wait, Path(folder)), args.runs)
    print(
        f"{args.model_version}, {model.num_layers} layers, {size / 1e9:.2f} GB: ready in {opening:.2f} s, "
        f"{size / opening / 1e9:.2f} GB/s; of it the check of SHA-256 {checking:.2f} s; "
        f"one thread reads the page cache with {size / reading / 1e9:.2f} GB/s"
    )
    return 0


def seconds(call: Callable[[], None], runs: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(max(runs, 1)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read(path: Path) -> None:
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def verify(engine: Engine) -> None:
    with verified_meanwhile(engine, Solo()):
        pass


def open_and_wait(folder: Path) -> None:
    open_session(folder, Solo())
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
