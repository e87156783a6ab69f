"""run.py's flags."""

from __future__ import annotations

import argparse
from typing import Any, get_type_hints

from baichuan.cli.common import ENGINE_DIR, add_device, add_model_version
from baichuan.cli.memory_flags import add_memory_flags
from baichuan.config import SamplingConfig

DEFAULT_TEXT = "世界上第二高的山峰是哪座？"
FILE_FLAGS = ("prompt_file", "output_jsonl", "input_tokens", "output_csv", "output_npy", "output_logits_npy")
SAMPLING_FLAGS = {
    "num_beams": "beams of beam search; 1 means sampling, or greedy decoding with --top_k 1",
    "top_k": "sample from this many of the likeliest tokens; 0 means all",
    "top_p": "sample from the likeliest tokens that together have this probability; 0 or 1 means all",
    "temperature": "lower values favour likely tokens more; 0 means greedy decoding",
    "repetition_penalty": "values above 1 make tokens that occurred before less likely",
    "length_penalty": "beam search: values above 0 favour longer continuations",
    "random_seed": "the same seed gives the same text",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_version(parser, "must agree with the engine, which knows its version")
    parser.add_argument("--max_output_len", type=int, required=True, help="most new tokens")
    parser.add_argument("--engine_dir", default=ENGINE_DIR, help="engine folder written by build.py")
    parser.add_argument(
        "--tokenizer_dir", help="checkpoint folder or hub id; only needed if the engine has no tokenizer"
    )
    parser.add_argument("--input_text", nargs="+", help=f"one prompt or several (default: {DEFAULT_TEXT})")
    parser.add_argument("--input_tokens", help="prompts as ids: FILE.csv with one row per prompt, or FILE.npy")
    parser.add_argument("--output_csv", help="write prompt and continuation as ids, one row per prompt")
    parser.add_argument("--output_npy", help="write the same as a padded int32 array")
    parser.add_argument("--output_logits_npy", help="write the logits from which each token was chosen, float32")
    _add_file_flags(parser)
    parser.add_argument("--streaming", action="store_true", help="print the text while it is generated")
    parser.add_argument(
        "--chat", action="store_true", help="treat the prompt as a user message; without a prompt, hold a conversation"
    )
    parser.add_argument("--system", help="chat: system message")
    add_device(parser, "runs the engine")
    add_memory_flags(parser)
    group = parser.add_argument_group(
        "sampling (defaults: the checkpoint's generation settings, or else its version's)"
    )
    types = get_type_hints(SamplingConfig)
    for name, text in SAMPLING_FLAGS.items():
        group.add_argument(f"--{name}", type=types[name], help=text)


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt_file", help="any number of prompts: a txt, jsonl, csv or parquet file; needs --output_jsonl"
    )
    parser.add_argument("--output_jsonl", help="where the results of --prompt_file are written as they come")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the --output_jsonl of a run that was stopped or has failed"
    )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The values of those SAMPLING_FLAGS that the user gave."""
    return {name: getattr(args, name) for name in SAMPLING_FLAGS if name in args.given}
