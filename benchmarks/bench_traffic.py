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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.api.ranks import Ranks
from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, BuildConfig, ModelConfig, SamplingConfig
from baichuan.executors.cuda.comm import join_gpus
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.ops import Switches
from baichuan.generation.in_flight import CHUNK_TOKENS, InFlight, Policy
from baichuan.generation.requests import Request, Serving
from baichuan.parallel.comm import Communicator
from baichuan.util.files import atomic_path
from benchmarks.gpu_timing import require_gpu
from benchmarks.random_weights import PRECISIONS, RandomWeights, add_engine_flags

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
SIGMA = 1.0  # of the lengths' logarithms: half of them between 0.5 and 2 times the median
LONGEST = 1024
SHARED_TOKENS = 1000
PERCENTILES = (50, 90, 99)


@dataclass
class Clock:
    """When what happened, in seconds of time.perf_counter()."""

    came: float
    heard: list[float] = field(default_factory=list)  # each new token


@dataclass(frozen=True)
class Engine:
    """What is measured, on rank 0."""

    serving: Serving  # of all ranks
    own: InFlight  # this rank's part of it, whose counters are read
    static: Serving  # of all ranks, over the same weights and cache: nothing decodes before all prompts are computed


@dataclass(frozen=True)
class Result:
    """One run of traffic."""

    name: str
    requests: int
    tokens_per_s: float
    full_tokens_per_s: float  # while as many requests are unfinished as there are rows
    requests_per_s: float
    first_token_ms: list[float]  # at PERCENTILES
    between_tokens_ms: list[float]
    rows: float  # that decode in a step, on average
    context: float  # tokens that a row attends to, on average
    cache_share: float  # of the blocks, at the fullest
    preemptions: int
    planning_share: float  # of the time
    full_planning_share: float  # of the time while all rows run

    @property
    def line(self) -> str:
        first, between = (
            "/".join(f"{ms:.0f}" for ms in each) for each in (self.first_token_ms, self.between_tokens_ms)
        )
        return (
            f"{self.name:22s} {self.requests:5d} | {self.tokens_per_s:8.0f} {self.full_tokens_per_s:6.0f} "
            f"{self.requests_per_s:7.2f} | {first:>18s} "
            f"{between:>14s} | {self.context:7.0f} "
            f"{self.cache_share:5.0%} {self.preemptions:6d} {self.planning_share:6.1%} {self.full_planning_share:6.1%}"
        )


TITLES = (
    "traffic                 reqs |    tok/s   full  reqs/s | first p50/90/99 ms   between, ms "
    "| context cache preempt   plan   full | to uniform, full"
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--model_version", choices=tuple(PRESETS), default="v1_7b", help="whose shapes")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float16", help="of the weights")
    add_traffic_flags(parser)
    parser.add_argument("--arrivals", type=int, default=300, help="of each traffic one by one; 0 = none")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="of the rate all at once")
    parser.add_argument("--static_batches", type=int, default=1, help="of requests of the same lengths; 0 = none")
    add_engine_flags(parser)
    return run_script(parser, argv, bench)


def add_traffic_flags(parser: Parser) -> None:
    """What requests are drawn by, and how many run at once."""
    parser.add_argument("--rows", type=int, default=256, help="requests that run at once")
    parser.add_argument("--requests", type=int, default=1000, help="of the traffic all at once")
    parser.add_argument("--mean_input", type=int, default=220, help="tokens of a prompt")
    parser.add_argument("--mean_output", type=int, default=190, help="tokens of a continuation")
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt and continuation, in tokens")
    parser.add_argument("--chunk_tokens", type=int, default=CHUNK_TOKENS, help="of prompts beside running requests")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals")


def bench(args: argparse.Namespace, host: Communicator) -> int:
    require_gpu("bench_traffic.py", "bench_cpu.py measures the CPU")
    device, comm = join_gpus(host)
    ranks = Ranks(comm)
    model, own, static = open_in_flight(args, device, comm)
    engine = Engine(ranks.join(own), own, ranks.join(static))
    ranks.lead(lambda: measure(args, model, engine, comm.world_size))
    return 0


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
        came = generator.exponential(1 / rate, args.arrivals).cumsum().tolist()
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
    ratios = [each / uniform for each in (result.tokens_per_s, result.full_tokens_per_s)]
    print(f"{result.line} | {ratios[0]:.2f}, {ratios[1]:.2f}", flush=True)


def open_in_flight(
    args: argparse.Namespace, device: torch.device, comm: Communicator
) -> tuple[ModelConfig, InFlight, InFlight]:
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


def drawn(args: argparse.Namespace, model: ModelConfig, generator: np.random.Generator, count: int) -> list[Request]:
    """New requests, whose prompts no cache holds: lognormal lengths, with these means once cut at the longest."""
    inputs = lognormal(generator, count, args.mean_input, args.longest)
    outputs = lognormal(generator, count, args.mean_output, args.longest)
    ids = generator.integers(3, model.vocab_size, int(sum(inputs))).tolist()
    requests, start = [], 0
    for number, (length, new) in enumerate(zip(inputs, outputs, strict=True)):
        prompt = tuple(ids[start : start + length])
        requests.append(Request(number, prompt, GREEDY, new))
        start += length
    return requests


def lognormal(generator: np.random.Generator, count: int, mean: float, longest: int) -> list[int]:
    """Lengths from 1 to `longest` with this mean: the scale is found by bisection, after the cut."""
    draws, low, high = np.exp(SIGMA * generator.standard_normal(count)), 0.0, float(longest)
    for _ in range(50):
        scale = (low + high) / 2
        lengths = np.clip(np.round(scale * draws), 1, longest)
        low, high = (scale, high) if lengths.mean() < mean else (low, scale)
    return lengths.astype(int).tolist()


def alike(args: argparse.Namespace, model: ModelConfig, generator: np.random.Generator) -> Request:
    """A request with both lengths at their means."""
    prompt = generator.integers(3, model.vocab_size, args.mean_input).tolist()
    return Request(tuple(prompt), tuple(prompt), GREEDY, args.mean_output)


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


def drain(serving: Serving) -> None:
    while serving.unfinished:
        serving.step()
    torch.cuda.synchronize()


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


def run(engine: Engine, name: str, requests: Sequence[Request], came: Sequence[float]) -> Result:
    """came: when each request arrives, in seconds from the start, in order."""
    serving, scheduler, pool = engine.serving, engine.own.scheduler, engine.own.scheduler.pool
    preemptions, fullest, planning, planned = scheduler.preemptions, 0, [0.0], scheduler.plan
    attended = np.zeros(3)  # (tokens, rows, 1) summed over steps that decode

    def plan():
        begun = time.perf_counter()
        value = planned()
        planning[0] += time.perf_counter() - begun
        contexts = [piece.start + 1 for piece in value.pieces if piece.decodes] if value else []
        attended[:] += sum(contexts), len(contexts), bool(contexts)
        return value

    scheduler.plan = plan  # type: ignore[method-assign]
    start = time.perf_counter()
    clocks = {request.key: Clock(start + at) for request, at in zip(requests, came, strict=True)}
    waiting = list(zip(requests, came, strict=True))[::-1]
    made, full = 0, (0, 0.0, 0.0)  # full: (tokens, seconds, seconds of planning) until rows run empty
    while waiting or serving.unfinished:
        if waiting:  # whoever comes while the GPU has enough to do is in the next step
            time.sleep(engine.own.spare_s)
        now = time.perf_counter() - start
        while waiting and waiting[-1][1] <= now:
            serving.add(waiting.pop()[0])
        if not serving.unfinished:
            time.sleep(max(waiting[-1][1] - (time.perf_counter() - start), 0))
            continue
        for progress in serving.step():
            assert progress.error is None, progress.error
            clocks[progress.key].heard += [time.perf_counter()] * len(progress.new_ids)
            made += len(progress.new_ids)
        if serving.unfinished >= engine.own.build.max_rows:
            full = made, time.perf_counter() - start, planning[0]
        fullest = max(fullest, pool.blocks - pool.free)
    seconds = time.perf_counter() - start
    scheduler.plan = planned  # type: ignore[method-assign]
    settled = start + (came[len(came) // 3] if came[-1] else 0.0), start + (came[-1] or seconds)
    first, between = times(clocks.values(), *settled)
    return Result(
        name=name,
        requests=len(requests),
        tokens_per_s=sum(len(clock.heard) for clock in clocks.values()) / seconds,
        full_tokens_per_s=full[0] / max(full[1], 1e-9),
        requests_per_s=len(requests) / seconds,
        first_token_ms=percentiles(first),
        between_tokens_ms=percentiles(between),
        rows=attended[1] / max(attended[2], 1),
        context=attended[0] / max(attended[1], 1),
        cache_share=fullest / pool.blocks,
        preemptions=scheduler.preemptions - preemptions,
        planning_share=planning[0] / seconds,
        full_planning_share=full[2] / max(full[1], 1e-9),
    )


def times(clocks: Iterable[Clock], begin: float, end: float) -> tuple[list[float], list[float]]:
    """(seconds to the first token of requests that came, seconds between tokens that were heard) from begin to end"""
    first, between = [], []
    for clock in clocks:
        if begin <= clock.came <= end:
            first.append(clock.heard[0] - clock.came)
        between += [late - early for early, late in pairwise(clock.heard) if begin <= early and late <= end]
    return first, between


def percentiles(seconds: Sequence[float] | np.ndarray) -> list[float]:
    """In milliseconds."""
    return [1e3 * float(each) for each in np.percentile(seconds, PERCENTILES)] if len(seconds) else []


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


if __name__ == "__main__":
    sys.exit(main())
