"""What summarize.py does: articles summarised by engines and by the checkpoint, measured alike."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from os.path import realpath
from pathlib import Path
from typing import Any

import torch

from baichuan.api.llm import LLM
from baichuan.api.ranks import Ranks
from baichuan.cli.common import check_device, only_rank_zero
from baichuan.cli.memory_flags import memory_settings
from baichuan.cli.summarize_flags import DATA_TYPES, check_flags, is_text, request_of
from baichuan.cli.unused_flags import say_unused
from baichuan.config import BYTES_PER_ELEMENT, ModelConfig, to_json
from baichuan.engine.folder import Engine
from baichuan.engine.self_check import float32_bytes
from baichuan.engine.text import open_text, require_text
from baichuan.errors import ConfigError
from baichuan.evaluation import perplexity
from baichuan.evaluation.datasets import load_samples
from baichuan.evaluation.journal import run_all
from baichuan.evaluation.request import Request
from baichuan.evaluation.rouge import TOKENIZER, Rouge
from baichuan.evaluation.sides import EngineSide, HfSide, Side, check_hf_sampling, enough_memory
from baichuan.evaluation.summary import Evaluation, check_tasks
from baichuan.evaluation.tasks import Task, make_task
from baichuan.evaluation.wording import decoding
from baichuan.executors.device import resolve_device
from baichuan.executors.memory import require_host_memory
from baichuan.generation.limits import check_request
from baichuan.parallel.comm import Communicator
from baichuan.text.printable import one_line, printable
from baichuan.text.tokenizer import MODEL_NAME, Tokenizer
from baichuan.weights.hub.adapter import resolve_adapter
from baichuan.weights.hub.checkpoint import resolve_folder, resolve_tokenizer
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.hub.version import require_tokenizer

logger = logging.getLogger(__name__)

BELOW_THRESHOLD = 1  # exit code

HfFiles = tuple[Path, ModelConfig, list[Path]]  # the checkpoint's folder, its model, and the adapters' folders


def summarize(args: argparse.Namespace, comm: Communicator) -> int:
    check_flags(args, comm)
    check_device(args, comm)
    ranks = Ranks(comm)
    llms = open_engines(args, ranks) if args.test_trt_llm else []
    engines = [llm.engine for llm in llms]
    request = request_of(args, min((engine.build.max_batch_size for engine in engines), default=1))
    if not is_text(args):
        check_limits(args, request, engines)
    say_of_other_sides(args, engines)
    say_unused(args, request.sampling, engines)
    hf = only_rank_zero(comm, lambda: find_hf(args, engines)) if args.test_hf else None
    output_dir = only_rank_zero(comm, lambda: prepared_folder(args.output_dir))
    tokenizer = only_rank_zero(comm, lambda: open_tokenizer(args, engines, hf[1] if hf else None))
    load = load_windows if is_text(args) else load_tasks
    loaded = only_rank_zero(comm, lambda: load(args, request, tokenizer, engines))
    for llm in llms:
        llm.load()

    def measure() -> int:
        if is_text(args):
            return measure_text(args, open_sides(args, llms, hf), loaded, output_dir)
        tasks, settings = loaded
        evaluation = Evaluation(
            open_sides(args, llms, hf),
            tasks,
            request,
            tokenizer,
            Rouge(),
            scoring=is_scoring(args),
            reference=HfSide.key if llms and args.test_hf else None,
        )
        run_all(evaluation, {**settings, **run_settings(args, request, comm)}, output_dir)
        return verdict(args, evaluation)

    return comm.broadcast_object(ranks.lead(measure))


def is_scoring(args: argparse.Namespace) -> bool:
    """Whether texts are scored: for their perplexity, or to compare the engines with the transformers model."""
    return args.eval_ppl or (args.test_trt_llm and args.test_hf)


def open_engines(args: argparse.Namespace, ranks: Ranks) -> list[LLM]:
    """Every engine, without its weights.  Raises ConfigError unless one tokenizer and one checkpoint fit all."""
    if twice := [name for name, count in Counter(map(realpath, args.engine_dir)).items() if count > 1]:
        raise ConfigError(f"engine_dir {twice[0]} is given twice; name each engine once")
    settings = memory_settings(args, len(args.engine_dir) + bool(args.test_hf))
    settings |= {"device": args.device, "model_version": args.model_version}
    llms = [LLM(folder, ranks=ranks, digests=args.ahead.digests, **settings) for folder in args.engine_dir]
    engines = [llm.engine for llm in llms]
    for name in ("model_version", "vocab_size", "num_layers", "hidden_size"):
        if len(values := {getattr(engine.model, name) for engine in engines}) > 1:
            found = ", ".join(f"{getattr(engine.model, name)} in {engine.folder}" for engine in engines)
            raise ConfigError(f"{name} has {len(values)} values ({found}); compare engines of one checkpoint")
    tokenizers = {str(engine.text_files[MODEL_NAME]["sha256"]) for engine in engines if MODEL_NAME in engine.text_files}
    if len(tokenizers) > 1:
        raise ConfigError(f"the engines have {len(tokenizers)} different tokenizers; compare engines of one checkpoint")
    return llms


def say_of_other_sides(args: argparse.Namespace, engines: Sequence[Engine]) -> None:
    """Say which of the flags changes nothing that the old example's commands give for a side that is not measured."""
    if not engines and "engine_dir" in args.given:
        logger.info("engine_dir %s is for --test_trt_llm; the checkpoint alone is measured", " ".join(args.engine_dir))
    if args.test_hf:
        return
    if "data_type" in args.given:
        dtypes = " and ".join(dict.fromkeys(engine.model.dtype for engine in engines))
        logger.info("data_type %s is for --test_hf; the engine is %s", args.data_type, dtypes)
    own = any(MODEL_NAME in engine.text_files for engine in engines)
    if args.hf_model_dir and (own or args.tokenizer_dir):
        tokenizer = "the engine has its own tokenizer" if own else "--tokenizer_dir has the tokenizer"
        logger.info("hf_model_dir %s is for --test_hf; %s", args.hf_model_dir, tokenizer)


def check_limits(args: argparse.Namespace, request: Request, engines: Sequence[Engine]) -> None:
    """Raise a BaichuanError, before anything is loaded, for limits that a side cannot hold with any article."""
    for engine in engines:
        check_request(engine.model, engine.build, [0], request.sampling, request.output_len)
    if args.test_hf:
        check_hf_sampling(request.sampling)
        resolve_device(args.hf_device or args.device)


def prepared_folder(output_dir: str | None) -> Path | None:
    if output_dir is None:
        return None
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be made ({error.strerror}); choose another folder") from None
    return folder


def open_tokenizer(args: argparse.Namespace, engines: Sequence[Engine], hf_model: ModelConfig | None) -> Tokenizer:
    """The engines' own tokenizer, which a given one must equal; else --tokenizer_dir's or the checkpoint's."""
    owner = next((engine for engine in engines if MODEL_NAME in engine.text_files), None)
    given = args.tokenizer_dir or (args.hf_model_dir if args.test_hf or not owner else None)
    folder = resolve_tokenizer(given) if given else None
    if owner and not args.tokenizer_dir and folder and not (folder / MODEL_NAME).is_file():
        folder = None
    if not engines:
        assert folder is not None, "check_flags has required one"
        tokenizer = Tokenizer(folder)
        if hf_model:
            require_tokenizer(tokenizer, str(given), hf_model)
        return tokenizer
    fallback = folder or (owner.folder if owner else None)  # the tokenizer of engines without their own
    texts = [open_text(each, folder if MODEL_NAME in each.text_files else fallback) for each in engines]
    return [require_text(*pair) for pair in zip(engines, texts, strict=True)][0]


def load_tasks(
    args: argparse.Namespace, request: Request, tokenizer: Tokenizer, engines: Sequence[Engine]
) -> tuple[list[Task], dict[str, Any]]:
    """The articles as prompts, and what the report says of them.  Raises ConfigError for what a side cannot hold."""
    path = Path(args.dataset_path) if args.dataset_path else None
    dataset = load_samples(path, (args.batch_size or 1) * args.max_ite)
    limit = min((engine.build.max_input_len for engine in engines), default=None)  # tokens that all accept
    tasks = [make_task(sample, tokenizer, request.max_input_length, limit) for sample in dataset.samples]
    if cut := sum(task.left_out > 0 for task in tasks):
        logger.info("%d of %d prompts are cut to their last %d tokens", cut, len(tasks), request.max_input_length)
    check_tasks(tasks, request, [engine.spec for engine in engines], is_scoring(args))
    return tasks, {"dataset": dataset.source, "rows_left_out": dataset.left_out, "scored_tokens_limit": limit}


def load_windows(
    args: argparse.Namespace, request: Request, tokenizer: Tokenizer, engines: Sequence[Engine]
) -> perplexity.Windows:
    """A text file in windows that every side accepts."""
    limits = [request.max_input_length, *(engine.build.max_input_len for engine in engines)]
    return perplexity.read_windows(Path(args.dataset_path), tokenizer, min(limits), args.max_ite)


def measure_text(
    args: argparse.Namespace, sides: Sequence[Side], windows: perplexity.Windows, output_dir: Path | None
) -> int:
    """Print, and save where there is a folder, the sides' perplexity of a text file."""
    reference = next((side for side in sides if side.key == HfSide.key and len(sides) > 1), None)
    totals = perplexity.score_windows(sides, reference, windows)
    settings = {"window_tokens": max(map(len, windows.ids)), "max_ite": args.max_ite, "lora_dir": args.lora_dir}
    values = perplexity.results(sides, reference, windows, totals, settings)
    print(printable(perplexity.text_of(values)))
    if output_dir:
        logger.info("the figures are in %s", perplexity.save(values, output_dir))
    return 0


def open_sides(args: argparse.Namespace, llms: Sequence[LLM], hf: HfFiles | None) -> list[Side]:
    """The engines, then the transformers model.  hf: what find_hf found."""
    keys = [f"engine_{number}" for number in range(1, len(llms) + 1)] if len(llms) > 1 else ["engine"]
    sides: list[Side] = [EngineSide(llm, key) for llm, key in zip(llms, keys, strict=False)]
    tell_apart(sides)
    return sides + ([open_hf(args, *hf, llms[-1].load()[1] if llms else None)] if hf else [])


def tell_apart(sides: Sequence[Side]) -> None:
    """Add the folder to labels that several engines share."""
    shared = [label for label, count in Counter(side.label for side in sides).items() if count > 1]
    for side in sides:
        if side.label in shared:
            side.label += f", {side.facts['engine_dir']}"


def find_hf(args: argparse.Namespace, engines: Sequence[Engine]) -> HfFiles:
    """The checkpoint, whose model must be of the engines' version."""
    folder = resolve_folder(args.hf_model_dir)
    version = args.model_version or (engines[0].model.model_version if engines else None)
    model = read_model_config(folder, version, DATA_TYPES[args.data_type])
    return folder, model, [resolve_adapter(name) for name in args.lora_dir]


def open_hf(
    args: argparse.Namespace, folder: Path, model: ModelConfig, adapters: list[Path], near: torch.device | None
) -> HfSide:
    """The transformers model; near: the engine's device, which it shares if that is a GPU."""
    from baichuan.hf_model.modeling import load_hf_model

    kind = resolve_device(args.hf_device or args.device)
    device = near if near is not None and near.type == kind else torch.device(kind)
    size = float32_bytes(model) * BYTES_PER_ELEMENT[model.dtype] // BYTES_PER_ELEMENT["float32"]
    require_host_memory(size, f"the transformers model in {args.data_type}")  # the model is read into host memory first
    with enough_memory():
        return HfSide(load_hf_model(folder, model.model_version, model.dtype, device, adapters), str(args.hf_model_dir))


def run_settings(args: argparse.Namespace, request: Request, comm: Communicator) -> dict[str, Any]:
    """The settings that the figures were obtained with, as JSON values."""
    return {
        "batch_size": request.batch_size,
        "max_ite": args.max_ite,
        "output_len": request.output_len,
        "max_input_length": request.max_input_length,
        "decoding": decoding(request.sampling),
        "sampling": to_json(request.sampling),
        "eval_ppl": request.eval_ppl,
        "rouge_tokenizer": TOKENIZER,
        "world_size": comm.world_size,
        "lora_dir": args.lora_dir,
        "tokenizer_dir": args.tokenizer_dir or args.hf_model_dir or args.engine_dir,
    }


def verdict(args: argparse.Namespace, evaluation: Evaluation) -> int:
    """Exit code."""
    if not args.check_accuracy:
        return 0
    threshold = args.tensorrt_llm_rouge1_threshold
    engines = [side for side in evaluation.sides if side.key != HfSide.key]
    scores = {side.label: evaluation.figures(side.key).rouge["rouge1"].value for side in engines}
    low = {label: score for label, score in scores.items() if score < threshold}
    for label, score in low.items():
        print(
            f"{Path(__file__).name}: ROUGE-1 of {one_line(label)} is {score:.2f} and at least {threshold:g} is "
            "required; compare with --test_hf, or build with a finer quantisation",
            file=sys.stderr,
        )
    return BELOW_THRESHOLD if low else 0
