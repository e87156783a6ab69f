"""Flags that were given and change nothing here, as settings, engines or the device decide: a line of the log for each.

What the flags alone decide is refused instead (check_flags of run.py and of summarize.py).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from baichuan.cli.memory_flags import MEMORY_FLAGS
from baichuan.cli.run_flags import given_sampling
from baichuan.config import SamplingConfig
from baichuan.engine.folder import Engine
from baichuan.executors.device import resolve_device

logger = logging.getLogger(__name__)


def say_unused(args: argparse.Namespace, sampling: SamplingConfig, engines: Sequence[Engine]) -> None:
    """Say which given flag changes nothing: in greedy decoding, which draws nothing, or with any of the engines."""
    if sampling.greedy:
        cause = "temperature 0" if sampling.temperature == 0 else "top_k 1"
        for name, value in given_sampling(args).items():
            if name in ("temperature", "top_k", "top_p", "random_seed") and f"{name} {value:g}" != cause:
                logger.info("%s is greedy decoding, where --%s changes nothing", cause, name)
    for name in (name for name in MEMORY_FLAGS if name in args.given and engines):
        reasons = [_why_unused(name, engine, args.device) for engine in engines]
        if all(reasons):
            logger.info("--%s changes nothing: %s", name, "; ".join(filter(None, dict.fromkeys(reasons))))


def _why_unused(name: str, engine: Engine, device: str) -> str | None:
    """None where the engine heeds the flag."""
    backend, weights = engine.backend, engine.quant.weights
    if name != "no_weight_copies":
        return None if backend.paged else f"{backend.title} has no paged KV cache"
    if not backend.keeps_copies:
        return f"{backend.title} keeps no copies of weights"
    if weights not in ("int8", "int4"):
        return "copies are of INT8 and INT4 weights, and the engine has others"
    return "on a CPU no copies of weights are kept" if resolve_device(device) == "cpu" else None
