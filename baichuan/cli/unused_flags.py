"""Flags that were given and change nothing here, as settings, engines or the device decide: a line of the log for each.

What the flags alone decide is refused instead (check_flags of run.py and of summarize.py).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from baichuan.api.greedy_settings import unused_when_greedy
from baichuan.api.unused_settings import say_unused_settings
from baichuan.cli.memory_flags import MEMORY_FLAGS
from baichuan.cli.run_flags import given_sampling
from baichuan.config import SamplingConfig
from baichuan.engine.folder import Engine

logger = logging.getLogger(__name__)


def say_unused(args: argparse.Namespace, sampling: SamplingConfig, engines: Sequence[Engine]) -> None:
    """Say which given flag changes nothing: in greedy decoding, which draws nothing, or with any of the engines."""
    for sentence in unused_when_greedy(given_sampling(args), sampling, "--"):
        logger.info("%s", sentence)
    given = {setting: f"--{flag}" for flag, setting in MEMORY_FLAGS.items() if flag in args.given}
    say_unused_settings(given, engines, args.device)
