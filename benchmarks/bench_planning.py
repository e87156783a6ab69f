"""What the host does for a step of traffic, without a GPU: python benchmarks/bench_planning.py

Requests of traffic.py's lengths run through the scheduler and the session over an executor that computes
nothing.  Prints microseconds, of steps in which nearly as many rows decode as ever, alone and beside chunks of prompts:
of the scheduler's decisions (the plan, and what it is told of new tokens and ended requests), and of all that the host
does.  On a GPU the host adds the copies to the device and the launch of the step's graph, all while the step before
runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, BuildConfig, ModelConfig
from baichuan.executors.kv_cache import KVCache
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.parallel.comm import Communicator
from baichuan.records import LayerCache, Step
from benchmarks.traffic import add_traffic_flags, drawn

VOCABULARY = 8  # choosing tokens is not what is measured
FULL = 0.9  # a step is full with this share of the rows that decode in the fullest step
SCHEDULING = ("plan", "extend", "finish")  # methods of the scheduler


class Nothing:
    """base.PagedExecutor whose steps take no time."""

    paged, device = True, torch.device("cpu")

    def __init__(self, rows: int, capacity: int, tokens_per_block: int = 64):
        per_row = -(-capacity // tokens_per_block)
        numbers = torch.zeros(rows * per_row, 1, tokens_per_block, 1)
        self.cache = KVCache((LayerCache(numbers, numbers, torch.zeros(rows, per_row, dtype=torch.int32)),))
        self._logits = torch.zeros(16384, VOCABULARY)

    def reset(self, rows: int, capacity: int) -> None:
        pass

    def forward(self, step: Step) -> torch.Tensor:
        return self._logits[: len(step.output_rows)]


@dataclass(frozen=True)
class Taken:
    """One step of the host."""

    decoding: int  # rows
    prompt_tokens: int
    scheduling_s: float
    host_s: float


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_traffic_flags(parser)
    return run_script(parser, argv, bench)


def bench(args: argparse.Namespace, _: Communicator) -> int:
    model = replace(PRESETS["v1_7b"], vocab_size=VOCABULARY)
    steps = taken(args, model)
    print(f"{args.rows} rows, {args.requests} requests, chunks of {args.chunk_tokens} tokens, {len(steps)} steps")
    least = FULL * max(each.decoding for each in steps)
    print(f"{'us':16s} steps  rows | scheduling: median   mean longest | the host in all: median   mean longest")
    for name, prompts in (("decode alone", False), ("beside prompts", True)):
        full = [each for each in steps if each.decoding >= least and bool(each.prompt_tokens) == prompts]
        if full:
            own, whole = (columns([getattr(each, part) for each in full]) for part in ("scheduling_s", "host_s"))
            rows = statistics.mean(each.decoding for each in full)
            print(f"{name:16s} {len(full):5d} {rows:5.0f} | {own:>33s} | {whole:>38s}")
    return 0


def columns(seconds: Sequence[float]) -> str:
    """Median, mean and longest, in microseconds."""
    values = statistics.median(seconds), statistics.mean(seconds), max(seconds)
    return " ".join(f"{1e6 * value:7.0f}" for value in values)


def taken(args: argparse.Namespace, model: ModelConfig) -> list[Taken]:
    """All requests at once, step by step."""
    build = BuildConfig(max_batch_size=args.rows, max_input_len=args.longest, max_output_len=args.longest)
    serving = InFlight(Nothing(args.rows, 2 * args.longest), model, build, Policy(args.chunk_tokens))
    serving.reads_late = True  # as on a GPU
    for request in drawn(args, model, np.random.default_rng(args.seed), args.requests):
        serving.add(request)
    spent, held = [0.0], [(0, 0)]
    for name in SCHEDULING:
        setattr(serving.scheduler, name, timed(getattr(serving.scheduler, name), spent))
    plan = serving.scheduler.plan

    def seen():
        value = plan()
        pieces = value.pieces if value else ()
        held[0] = sum(each.decodes for each in pieces), sum(each.length for each in pieces if not each.decodes)
        return value

    serving.scheduler.plan = seen  # type: ignore[method-assign]
    steps = []
    while serving.unfinished:
        spent[0], start = 0.0, time.perf_counter()
        serving.step()
        steps.append(Taken(*held[0], spent[0], time.perf_counter() - start))
    return steps


def timed(method: Callable, spent: list[float]) -> Callable:
    """The method, which adds its seconds to spent[0]."""

    def wrapped(*args):
        start = time.perf_counter()
        try:
            return method(*args)
        finally:
            spent[0] += time.perf_counter() - start

    return wrapped


if __name__ == "__main__":
    sys.exit(main())
