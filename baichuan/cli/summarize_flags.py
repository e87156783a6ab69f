"""summarize.py's flags, and the request that they make.  Every default is a dataclass's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from baichuan.api.beam_settings import check_beam_settings
from baichuan.cli.common import ENGINE_DIR, add_adapters, add_device, add_model_version
from baichuan.cli.memory_flags import MEMORY_FLAGS, add_memory_flags
from baichuan.cli.run_flags import SAMPLING_FLAGS, given_sampling
from baichuan.config import DEVICES, SamplingConfig, require_range
from baichuan.errors import ConfigError
from baichuan.evaluation.request import Request

if TYPE_CHECKING:
    from baichuan.parallel.comm import Communicator

TEXT_SUFFIX = ".txt"
THRESHOLD = 15.0  # ROUGE-1 in percent
SIDES = {  # flags that are for one side alone; the old example's --data_type and the folders' are accepted without it
    "test_trt_llm": ("check_accuracy", *MEMORY_FLAGS),
    "test_hf": ("lora_dir", "hf_device"),
}
DATA_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DEFAULTS = Request(SamplingConfig(top_k=1, top_p=0.0, temperature=1.0, repetition_penalty=1.0))


def add_flags(parser: argparse.ArgumentParser) -> None:
    for add in (_add_side_flags, _add_article_flags, _add_decoding_flags, _add_judging_flags):
        add(parser)


def _add_side_flags(parser: argparse.ArgumentParser) -> None:
    add_model_version(parser, "must agree with the engine and the checkpoint")
    sides = parser.add_argument_group("sides: either or both")
    sides.add_argument("--test_trt_llm", action="store_true", help="measure the engine")
    sides.add_argument("--test_hf", action="store_true", help="measure the checkpoint as a transformers model")
    sides.add_argument(
        "--engine_dir", nargs="+", default=[ENGINE_DIR], help="engine folders written by build.py, one side each"
    )
    sides.add_argument("--hf_model_dir", "--hf_model_location", help="checkpoint folder or hub id")
    add_adapters(sides, "--hf_model_dir")
    sides.add_argument(
        "--tokenizer_dir", help="folder with tokenizer.model; only needed if neither engine nor checkpoint has one"
    )
    sides.add_argument(
        "--data_type", choices=tuple(DATA_TYPES), default="fp16", help="data type of the transformers model"
    )
    add_device(sides, "runs the engine and the transformers model")
    add_memory_flags(sides)
    sides.add_argument(
        "--hf_device", choices=DEVICES, help="device of the transformers model (default: that of --device)"
    )


def _add_article_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("articles")
    work.add_argument(
        "--dataset_path",
        help="json, jsonl, csv or parquet file or folder (default: cnn_dailymail from the hub), or a txt file whose "
        "perplexity is measured",
    )
    work.add_argument(
        "--batch_size", type=int, help="articles that run at once (default: as many as the engines were built for)"
    )
    work.add_argument(
        "--max_ite",
        type=int,
        default=DEFAULTS.max_iterations,
        help="most articles, or with --batch_size most batches; of a txt file most windows",
    )
    work.add_argument("--output_len", type=int, default=DEFAULTS.output_len, help="most tokens per summary")
    work.add_argument(
        "--max_input_length",
        type=int,
        default=DEFAULTS.max_input_length,
        help="most tokens of a prompt, of a longer one the last are kept; tokens of a window of a txt file",
    )


def _add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_argument_group("decoding, the same on both sides")
    choice.add_argument("--num_beams", type=int, default=DEFAULTS.sampling.num_beams, help="1 means no beam search")
    choice.add_argument(
        "--top_k", type=int, default=DEFAULTS.sampling.top_k, help="1 means greedy decoding, 0 all tokens"
    )
    choice.add_argument("--top_p", type=float, default=DEFAULTS.sampling.top_p, help="0 or 1 means all tokens")
    for name in ("temperature", "repetition_penalty", "length_penalty"):
        default = getattr(DEFAULTS.sampling, name)
        choice.add_argument(f"--{name}", type=float, default=default, help=SAMPLING_FLAGS[name])
    seed = DEFAULTS.sampling.random_seed
    choice.add_argument("--random_seed", type=int, default=seed, help=SAMPLING_FLAGS["random_seed"])


def _add_judging_flags(parser: argparse.ArgumentParser) -> None:
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--eval_ppl",
        action="store_true",
        help="measure the perplexity of the articles with their highlights, or of a txt file",
    )
    judging.add_argument(
        "--check_accuracy", action="store_true", help="end with exit code 1 if ROUGE-1 of the engine is too low"
    )
    judging.add_argument(
        "--tensorrt_llm_rouge1_threshold",
        type=float,
        default=THRESHOLD,
        help="lowest ROUGE-1, in per cent, that --check_accuracy accepts",
    )
    judging.add_argument(
        "--output_dir", help="folder for results.json, summaries.jsonl and the report, or perplexity.json"
    )


def check_flags(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise ConfigError for flags that exclude or lack each other."""
    if not (args.test_trt_llm or args.test_hf):
        raise ConfigError("nothing to measure; give --test_trt_llm, --test_hf, or both")
    if args.test_hf and not args.hf_model_dir:
        raise ConfigError("--test_hf needs a checkpoint; give --hf_model_dir, its folder or hub id")
    for side, flags in SIDES.items():
        if not getattr(args, side) and (given := [name for name in flags if name in args.given]):
            raise ConfigError(f"--{given[0]} is for --{side}, which is not given; add that, or leave --{given[0]} out")
    if not args.test_trt_llm and {"device", "hf_device"} <= args.given:
        raise ConfigError("--hf_device says where --test_hf runs, which is given alone; leave --device out")
    require_range("tensorrt_llm_rouge1_threshold", args.tensorrt_llm_rouge1_threshold, 0.0, 100.0)
    if "tensorrt_llm_rouge1_threshold" in args.given and not args.check_accuracy:
        raise ConfigError("--tensorrt_llm_rouge1_threshold is what --check_accuracy judges by; add that")
    if comm.world_size > 1 and not args.test_trt_llm:
        raise ConfigError(f"--test_hf alone runs in one process and {comm.world_size} are running; leave mpirun out")
    if is_text(args):
        _check_text_flags(args)
    check_beam_settings(given_sampling(args), args.num_beams, "--")


def is_text(args: argparse.Namespace) -> bool:
    """Whether the data set is a text file, of which only the perplexity is measured."""
    return Path(args.dataset_path or "").suffix == TEXT_SUFFIX


def _check_text_flags(args: argparse.Namespace) -> None:
    if not args.eval_ppl:
        raise ConfigError(
            f"{args.dataset_path} has no highlights to compare summaries with; add --eval_ppl to measure its perplexity"
        )
    unused = ("output_len", "batch_size", "check_accuracy", *SAMPLING_FLAGS)
    if given := [name for name in unused if name in args.given]:
        raise ConfigError(f"nothing is generated from {args.dataset_path}; leave --{given[0]} out")


def request_of(args: argparse.Namespace, rows: int) -> Request:
    """rows: how many articles the engines can run at once.  Raises ConfigError for values out of range."""
    batch_size, batches = args.batch_size, args.max_ite
    if batch_size is None:
        batch_size = max(1, min(rows, args.max_ite))
        batches = -(-args.max_ite // batch_size)
    sampling = SamplingConfig(
        num_beams=args.num_beams,
        top_k=args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        length_penalty=args.length_penalty,
        random_seed=args.random_seed,
    )
    return Request(sampling, batch_size, batches, args.output_len, args.max_input_length, args.eval_ppl)
