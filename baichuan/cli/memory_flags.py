"""How much memory engines may take: the flags that run.py and summarize.py share."""

from __future__ import annotations

import argparse
from typing import Any

from baichuan.errors import ConfigError
from baichuan.executors.open_settings import LEAST_FRACTION, OpenSettings

MEMORY_FLAGS = {  # the argument of api.llm.LLM that each sets
    "no_weight_copies": "keep_copies",
    "kv_cache_free_gpu_mem_fraction": "kv_cache_free_gpu_mem_fraction",
    "no_prefix_caching": "prefix_caching",
}


def add_weight_copies(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--no_weight_copies",
        action="store_true",
        help="do not fill spare GPU memory with dequantised copies of INT8 and INT4 weights, which speed up large "
        "batches and long prompts",
    )


def add_memory_flags(parser: argparse._ActionsContainer) -> None:
    add_weight_copies(parser)
    parser.add_argument(
        "--kv_cache_free_gpu_mem_fraction",
        type=float,
        default=OpenSettings.kv_cache_free_gpu_mem_fraction,
        help="share of the free memory that a paged KV cache takes, unless the engine's limits need less",
    )
    parser.add_argument(
        "--no_prefix_caching",
        action="store_true",
        help="compute every prompt anew, even where its beginning is in a paged KV cache",
    )


def memory_settings(args: argparse.Namespace, sides: int = 1) -> dict[str, Any]:
    """api.llm.LLM's settings, for one of several models that share the memory.  Raises ConfigError."""
    fraction = args.kv_cache_free_gpu_mem_fraction
    OpenSettings(kv_cache_free_gpu_mem_fraction=fraction)  # raises where it is out of range as it was given
    if fraction / sides < LEAST_FRACTION:
        raise ConfigError(
            f"kv_cache_free_gpu_mem_fraction {fraction} is divided among {sides} models, each of which takes at least "
            f"{LEAST_FRACTION}; give {LEAST_FRACTION * sides:g} or more"
        )
    return {
        "keep_copies": not args.no_weight_copies,
        "kv_cache_free_gpu_mem_fraction": fraction / sides,
        "prefix_caching": not args.no_prefix_caching,
        "say_unused": False,  # cli/unused_flags.py does, in the flags' names
    }
