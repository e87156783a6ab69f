"""Where a step's time goes, kernel by kernel of a layer: python benchmarks/bench_layer.py

    python benchmarks/bench_layer.py --model_version v1_7b --precision float16 int8 int4
    mpirun -n 4 python benchmarks/bench_layer.py --model_version v2_13b --batch_size 1 64
    mpirun -n 2 python benchmarks/bench_layer.py --model_version v2_13b --prefill

torch.profiler watches replays of the captured step, which decodes or with --prefill computes the prompts, of a
shortened model with dummy weights.  A kernel begins while the one before it still runs, so that its time is counted
from that one's end to its own end: a layer's kernels add up to the layer.  Medians over all layers and replays, in
microseconds; of several ranks, those of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS
from baichuan.executors.cuda.comm import Nccl
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.device import gpu_of_rank
from baichuan.parallel.comm import Communicator
from baichuan.records import Step
from benchmarks.gpu_timing import copy_bandwidth, require_gpu
from benchmarks.random_weights import PRECISIONS, RandomWeights, add_kv_cache, add_model_flags

# A layer is counted from attention on: its first norm and qkv end the one before.
BEGINS_A_LAYER = ("_decode_attention", "_prefill_attention")
REPLAYS = 6


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add_kv_cache(parser)
    parser.add_argument("--num_layers", type=int, default=8, help="layers of the shortened model, at least 3")
    parser.add_argument("--prefill", action="store_true", help="the step of --input_len tokens instead of one token")
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, host: Communicator) -> int:
    require_gpu("bench_layer.py", "bench_cpu.py measures the CPU")
    device = gpu_of_rank(host)
    torch.cuda.set_device(device)
    comm = Nccl(host, device) if host.world_size > 1 else host
    bandwidth = copy_bandwidth()
    if host.rank == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    for version in args.model_version:
        for precision in args.precision:
            for batch in args.batch_size:
                times = layer_times(profile(args, version, precision, batch, comm, device))
                if host.rank == 0:
                    what = f"prefill of {batch} x {args.input_len}" if args.prefill else f"batch {batch}"
                    print_layer(f"{version} {precision} {what} tp {host.world_size}", times)
    return 0


def profile(
    args: argparse.Namespace, version: str, precision: str, batch: int, comm: Communicator, device: torch.device
) -> list[tuple[str, float]]:
    """The kernels of REPLAYS steps: (name, when it ended in microseconds)."""
    dtype = precision if precision == "bfloat16" else "float16"
    model = replace(PRESETS[version], dtype=dtype, num_layers=args.num_layers)
    model.check_tensor_parallel(comm.world_size)
    quant = replace(PRECISIONS[precision], kv_cache=args.kv_cache)
    weights = RandomWeights(model, quant, device).rank(comm.world_size, comm.rank)
    executor = CudaExecutor(model, quant, weights, comm)
    executor.reset(batch, args.input_len + 1)
    step = Step.of([[1] * args.input_len] * batch, device=device)
    executor.forward(step)
    if not args.prefill:
        step = step.next(torch.ones(batch, dtype=torch.int64, device=device))
    executor.forward(step)  # captured by now
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            executor.forward(step)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return [(each["name"], each["ts"] + each["dur"]) for each in events if each.get("cat") == "kernel"]


def layer_times(kernels: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """(name, median time) of each of a layer's kernels in turn, a time being the one from the end of the kernel before.

    kernels: (name, end) in any order, of several layers; those of a first or last layer, which have others beside them,
    are left out
    """
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    starts = [place for place, (name, _) in enumerate(ordered) if name.startswith(BEGINS_A_LAYER)]
    length, _ = Counter(end - start for start, end in pairwise(starts)).most_common(1)[0]
    layers = [start for start, end in pairwise(starts) if end - start == length and start > 0]
    return [
        (
            ordered[layers[0] + place][0],
            statistics.median(ordered[start + place][1] - ordered[start + place - 1][1] for start in layers),
        )
        for place in range(length)
    ]


def print_layer(title: str, times: Sequence[tuple[str, float]]) -> None:
    print(f"{title}: a layer takes {sum(time for _, time in times):.1f} us")
    for name, time in times:
        print(f"    {time:7.2f}  {name.lstrip('_')[:60]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
