"""Flags that were given and change nothing with the settings that they meet: a line of the log for each.

What the flags alone decide is refused instead (check_flags of run.py and of summarize.py).
"""

from __future__ import annotations

import argparse
import logging

from baichuan.cli.run_flags import given_sampling
from baichuan.config import SamplingConfig

logger = logging.getLogger(__name__)


def say_unused(args: argparse.Namespace, sampling: SamplingConfig) -> None:
    """Say which given flag changes nothing, because greedy decoding draws nothing."""
    if sampling.greedy:
        cause = "temperature 0" if sampling.temperature == 0 else "top_k 1"
        for name, value in given_sampling(args).items():
            if name in ("temperature", "top_k", "top_p", "random_seed") and f"{name} {value:g}" != cause:
                logger.info("%s is greedy decoding, where --%s changes nothing", cause, name)
