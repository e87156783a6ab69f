"""Traffic of a chat on GPUs, with dummy weights drawn there, nothing on disk: python benchmarks/bench_traffic.py

    python benchmarks/bench_traffic.py --model_version v2_13b --precision int8 --kv_cache int8 --rows 256
    mpirun -n 2 python benchmarks/bench_traffic.py

Requests have lognormal lengths from a seed.  They come (a) all at once and (b) one by one, as a Poisson process at
shares of the rate that (a) served while all rows ran.  Prints tokens and requests per second, the time to the first
token and between tokens at their 50th, 90th and 99th percentile, how full the KV cache became, how often a request had
to give up its blocks, and the share of the time that the scheduler's decisions took, also while all rows ran.  Of (b)
the times are those from the arrival of the first third of the requests to that of the last: before, the rows are still
filling, afterwards they run empty.  (a) runs empty, too, as long as the longest continuations last: "full" is the rate
until then.

Both rates are over those of a static batch of the same rows with every length at the mean, in the same run; its rate
counts the time of its prompts, too.  As rows run empty at the end, it is compared with a static batch of as many rows
as decode in a step on average, too.  Lengths that differ cost attention more: whoever looks at the rows at any time
finds long continuations more often than short ones.  "context" is the tokens a row attends to, on average over steps.
Both are also over the rate of --static_batches static batches of requests of these lengths, as many rows as the cache
holds at their longest, each of which lasts as long as its longest continuation.  Before all that, a prompt of 1000
tokens and another that begins with them: the second's time to its first token over the first's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.api.ranks import Ranks
from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, BuildConfig, ModelConfig
from baichuan.executors.cuda.comm import join_gpus
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.ops import Switches
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.generation.requests import Request, Serving
from baichuan.parallel.comm import Communicator
from baichuan.util.files import atomic_path
from benchmarks.gpu_timing import require_gpu
from benchmarks.random_weights import PRECISIONS, RandomWeights, add_engine_flags
from benchmarks.traffic import GREEDY, Engine, Result, add_traffic_flags, alike, drawn, poisson_arrivals, run

SHARED_TOKENS = 1000  # tokens that two prompts begin with
TITLES = (
    "traffic                 reqs |    tok/s   full  reqs/s | first p50/90/99 ms   between, ms "
    "| context cache preempt   plan   full | to uniform, full"
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model_version", choices=tuple(PRESETS), default="v1_7b", help="model whose shapes are taken")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float16", help="precision of the weights")
    add_traffic_flags(parser)
    parser.add_argument("--arrivals", type=int, default=300, help="of each traffic one by one; 0 = none")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="of the rate all at once")
    parser.add_argument("--static_batches", type=int, default=1, help="of requests of the same lengths; 0 = none")
    add_engine_flags(parser)
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, host: Communicator) -> int:
    require_gpu("bench_traffic.py", "bench_cpu.py measures the CPU")
    device, comm = join_gpus(host)
    ranks = Ranks(comm)
    model, own, static = open_in_flight(args, device, comm)
    engine = Engine(ranks.join(own), own, ranks.join(static))
    ranks.lead(lambda: measure(args, model, engine, comm.world_size))
    return 0


def open_in_flight(
    args: argparse.Namespace, device: torch.device, comm: Communicator
) -> tuple[ModelConfig, InFlight, InFlight]:
    """The model, and over one executor the in-flight batching that is measured and the static batching beside it."""
    dtype = args.precision if args.precision == "bfloat16" else "float16"
    model = PRESETS[args.model_version]
    model = replace(model, dtype=dtype, num_layers=args.num_layers or model.num_layers)
    model.check_tensor_parallel(comm.world_size)
    quant = replace(PRECISIONS[args.precision], kv_cache=args.kv_cache)
    weights = RandomWeights(model, quant, device).rank(comm.world_size, comm.rank)
    executor = CudaExecutor(model, quant, weights, comm, Switches(keep_copies=not args.no_weight_copies))
    build = BuildConfig(
        max_batch_size=args.rows,
        max_input_len=args.longest,
        max_output_len=args.longest,
        max_num_tokens=args.max_num_tokens,
    )
    policies = Policy(args.chunk_tokens), Policy(None, prefix_caching=False)
    own, static = (InFlight(executor, model, build, policy) for policy in policies)
    return model, own, static


def measure(args: argparse.Namespace, model: ModelConfig, engine: Engine, tp_size: int) -> None:
    """Print the lines, one measurement after another."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.model_version} {args.precision}, ", end="")
    print(f"KV cache {args.kv_cache}, {args.rows} rows, tensor parallel {tp_size}")
    generator = np.random.default_rng(args.seed)
    requests = drawn(args, model, generator, args.requests)
    lengths = [(len(each.prompt), each.max_new_tokens) for each in requests]
    print(f"lengths: mean {np.mean(lengths, axis=0).round(1)}, longest {np.max(lengths, axis=0)}")
    warm_up(engine, model, args, generator)
    static_rate(engine.static, [replace(alike(args, model, generator), max_new_tokens=2) for _ in range(args.rows)])
    uniform = static_rate(engine.static, [alike(args, model, generator) for _ in range(args.rows)])
    print(f"a static batch of {args.rows} x {args.mean_input} + {args.mean_output} tokens: {uniform:.0f} tokens/s")
    first, second = shared_prefix(engine, model, generator, min(SHARED_TOKENS, args.longest - 1))
    print(f"a shared prefix: first token after {1e3 * first:.1f} ms, then {1e3 * second:.1f}: {second / first:.2f} x")
    prefill, _ = shared_prefix(engine, model, generator, args.mean_input)
    print(f"the first token of {args.mean_input} alone: {1e3 * prefill:.1f} ms")
    facts: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "tp_size": tp_size}
    facts |= {"uniform": uniform, "shared_s": (first, second), "prefill_s": prefill}
    print(TITLES, flush=True)
    results = [run(engine, "all at once", requests, [0.0] * len(requests))]
    show(results[0], uniform)
    rows = max(round(results[0].rows), 1)
    same = static_rate(engine.static, [alike(args, model, generator) for _ in range(rows)])
    facts["uniform_of_average_rows"] = same
    print(f"    {rows} rows decode in a step on average; a static batch of so many: {same:.0f} tokens/s, ", end="")
    print(f"of which it is {results[0].tokens_per_s / same:.2f}", flush=True)
    for share in args.shares if args.arrivals else ():
        rate = share * (results[0].full_tokens_per_s or results[0].tokens_per_s) / args.mean_output
        came = poisson_arrivals(generator, rate, args.arrivals)
        name = f"{share:.0%}, {rate:.2f} a second"
        results.append(run(engine, name, drawn(args, model, generator, args.arrivals), came))
        show(results[-1], uniform)
        steps = (results[-1].first_token_ms[0] - 1e3 * prefill) / results[-1].between_tokens_ms[0]
        print(f"    the median first token comes after the prefill alone and {steps:.1f} steps", flush=True)
    if args.static_batches:
        facts["static"] = rate = static_batches(engine, args, model, generator)
        print(f"static batches: {rate:.0f} tokens/s; all at once is {results[0].tokens_per_s / rate:.2f} x that")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        with atomic_path(args.json) as part:
            results_json = [asdict(each) for each in results]
            part.write_text(json.dumps(facts | {"settings": settings, "results": results_json}, indent=1) + "\n")


def show(result: Result, uniform: float) -> None:
    """Print a line below TITLES."""
    first, between = (
        "/".join(f"{ms:.0f}" for ms in each) for each in (result.first_token_ms, result.between_tokens_ms)
    )
    ratios = [each / uniform for each in (result.tokens_per_s, result.full_tokens_per_s)]
    print(
        f"{result.name:22s} {result.requests:5d} | {result.tokens_per_s:8.0f} {result.full_tokens_per_s:6.0f} "
        f"{result.requests_per_s:7.2f} | {first:>18s} "
        f"{between:>14s} | {result.context:7.0f} "
        f"{result.cache_share:5.0%} {result.preemptions:6d} {result.planning_share:6.1%} "
        f"{result.full_planning_share:6.1%} | {ratios[0]:.2f}, {ratios[1]:.2f}",
        flush=True,
    )


def warm_up(engine: Engine, model: ModelConfig, args: argparse.Namespace, generator: np.random.Generator) -> None:
    """Compile kernels and capture the graphs of steps of all sizes that traffic has."""
    rows = [alike(args, model, generator) for _ in range(args.rows)]
    static_rate(
        engine.serving, [replace(each, max_new_tokens=1 + more) for more, each in enumerate(rows)]
    )  # row after row ends
    for _ in range(3):
        traffic = drawn(args, model, generator, 2 * args.rows)
        static_rate(engine.serving, [replace(each, max_new_tokens=min(each.max_new_tokens, 40)) for each in traffic])
    for steps in (1, 2, 4):  # fewer rows, joined one by one
        for request in drawn(args, model, generator, args.rows // 2):
            engine.serving.add(replace(request, max_new_tokens=min(request.max_new_tokens, 80)))
            for _ in range(steps):
                engine.serving.step()
        drain(engine.serving)


def shared_prefix(
    engine: Engine, model: ModelConfig, generator: np.random.Generator, tokens: int
) -> tuple[float, float]:
    """Seconds to the first token of a prompt, and of one that begins with the same tokens and has one more."""
    times = []
    for _ in range(2):  # the first pair warms up
        prompt = generator.integers(3, model.vocab_size, tokens).tolist()
        for more in (1, 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.serving.add(Request(more, (*prompt, more), GREEDY, 1))
            drain(engine.serving)
            times.append(time.perf_counter() - start)
    return times[2], times[3]


def static_rate(serving: Serving, requests: Sequence[Request]) -> float:
    """New tokens per second of requests that all start at once."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for request in requests:
        serving.add(request)
    drain(serving)
    return sum(request.max_new_tokens for request in requests) / (time.perf_counter() - start)


def static_batches(
    engine: Engine, args: argparse.Namespace, model: ModelConfig, generator: np.random.Generator
) -> float:
    """New tokens per second where a batch begins when the one before has ended.

    A batch has as many requests as the cache has room for at the longest lengths, `rows` at most, and each of them
    computes until the batch's longest has ended.
    """
    pool = engine.own.scheduler.pool
    rows = max(1, min(args.rows, pool.blocks // -(-2 * args.longest // pool.tokens_per_block)))
    made, passed = 0, 0.0
    for _ in range(args.static_batches):
        batch = drawn(args, model, generator, rows)
        new = max(request.max_new_tokens for request in batch)
        start = time.perf_counter()
        static_rate(engine.static, [replace(request, max_new_tokens=new) for request in batch])
        passed += time.perf_counter() - start
        made += sum(request.max_new_tokens for request in batch)
    return made / passed


def drain(serving: Serving) -> None:
    """Step until all requests have ended."""
    while serving.unfinished:
        serving.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
