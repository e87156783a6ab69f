"""Traffic: requests whose lengths come from a seed, and the throughput and latencies of serving them as they arrive."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from baichuan.cli.common import Parser
from baichuan.config import ModelConfig, SamplingConfig
from baichuan.generation.in_flight import CHUNK_TOKENS, InFlight
from baichuan.generation.requests import Request, Serving

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
SIGMA = 1.0  # standard deviation of the lengths' logarithms: half of the lengths are 0.5 to 2 times the median
LONGEST = 1024
PERCENTILES = (50, 90, 99)


@dataclass
class Clock:
    """When what happened, in seconds of time.perf_counter()."""

    came: float
    heard: list[float] = field(default_factory=list)  # when each new token was heard of


@dataclass(frozen=True)
class Engine:
    """What is measured, on rank 0."""

    serving: Serving  # runs on all ranks
    own: InFlight  # this rank's part of it, whose counters are read
    static: Serving  # as serving, over the same weights and cache: nothing decodes before all prompts are computed


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
    rows: float  # rows that decode in a step, on average
    context: float  # tokens that a row attends to, on average
    cache_share: float  # largest share of the blocks in use
    preemptions: int
    planning_share: float  # share of the time that planning takes
    full_planning_share: float  # the same while all rows run


def add_traffic_flags(parser: Parser) -> None:
    """What requests are drawn by, and how many run at once."""
    parser.add_argument("--rows", type=int, default=256, help="requests that run at once")
    parser.add_argument("--requests", type=int, default=1000, help="requests that come all at once")
    parser.add_argument("--mean_input", type=int, default=220, help="tokens of a prompt")
    parser.add_argument("--mean_output", type=int, default=190, help="tokens of a continuation")
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt and continuation, in tokens")
    parser.add_argument(
        "--chunk_tokens",
        type=int,
        default=CHUNK_TOKENS,
        help="tokens of prompts that a step computes beside running requests",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths, prompts and arrivals")


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


def poisson_arrivals(generator: np.random.Generator, rate: float, count: int) -> list[float]:
    """Seconds from the start at which requests of a Poisson process come, `rate` a second on average."""
    return generator.exponential(1 / rate, count).cumsum().tolist()


def run(engine: Engine, name: str, requests: Sequence[Request], came: Sequence[float]) -> Result:
    """Serve the requests as they come.  came: when each arrives, in seconds from the start, in order."""
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
    """The PERCENTILES in milliseconds; empty where nothing was timed."""
    return [1e3 * float(each) for each in np.percentile(seconds, PERCENTILES)] if len(seconds) else []
