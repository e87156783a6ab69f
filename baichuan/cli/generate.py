"""What run.py does: prompts in, text or ids out."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from os.path import realpath
from pathlib import Path

from baichuan.api.arguments import Prompt, said_of
from baichuan.api.beam_settings import check_beam_settings
from baichuan.api.llm import LLM
from baichuan.api.ranks import Ranks
from baichuan.api.results import Completion
from baichuan.cli.chat import chat as converse
from baichuan.cli.chat import open_conversation
from baichuan.cli.common import check_device
from baichuan.cli.memory_flags import memory_settings
from baichuan.cli.run_flags import DEFAULT_TEXT, FILE_FLAGS, given_sampling
from baichuan.cli.terminal import TextPrinter
from baichuan.cli.unused_flags import say_unused
from baichuan.config import SamplingConfig
from baichuan.engine.folder import CONFIG_NAME, Engine
from baichuan.engine.text import require_text
from baichuan.errors import ConfigError
from baichuan.generation import token_files
from baichuan.parallel.comm import Communicator
from baichuan.text.printable import printable
from baichuan.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def generate(args: argparse.Namespace, comm: Communicator) -> int:
    check_flags(args)
    check_device(args, comm)
    sampling_config(args, SamplingConfig())  # its errors come before the engine is read
    llm = open_llm(args, Ranks(comm))
    check_outputs(args, llm.engine)
    sampling = sampling_config(args, llm.sampling)
    say_unused(args, sampling, [llm.engine])
    if args.chat and args.input_text is None:
        sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *llm.roles))
        llm.requests([open_conversation(llm, args.system).ask("")], sampling, args.max_output_len)
        llm.lead(lambda: converse(llm, sampling, args.max_output_len, args.system, args.started_s))
        return 0
    if args.streaming:
        require_text(llm.engine, llm.text)
    prompts = read_prompts(args, sampling.pad_id)
    llm.requests(prompts, sampling, args.max_output_len)  # its errors come before weights are loaded
    llm.lead(lambda: answer(args, llm, prompts, sampling))
    return 0


def open_llm(args: argparse.Namespace, ranks: Ranks) -> LLM:
    return LLM(
        args.engine_dir,
        args.tokenizer_dir,
        device=args.device,
        **memory_settings(args),
        model_version=args.model_version,
        ranks=ranks,
        digests=args.ahead.digests,
    )


def answer(args: argparse.Namespace, llm: LLM, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
    """Continue the prompts; print and write the results."""
    llm.warm_up(prompts, sampling, args.max_output_len)
    logger.info("ready in %.1f s", time.monotonic() - args.started_s)
    keep_logits = bool(args.output_logits_npy)
    if args.streaming:
        results = [printed_meanwhile(llm, prompts[0], sampling, args.max_output_len, keep_logits)]
    else:
        results = llm.generate(prompts, sampling, args.max_output_len, keep_logits)
        print_results([result for result in results if not result.error], llm.text.tokenizer)
    for number, result in enumerate(results):
        with said_of(f"prompt {number}", len(results) > 1):
            result.checked()
    write_outputs(args, results, sampling.pad_id)
    for index, result in enumerate(results):
        count = len(result.ids)
        tokens = "1 new token" if count == 1 else f"{count} new tokens"
        logger.info("prompt %d: %s, finish reason %s", index, tokens, result.finish_reason)
    logger.info("%s", llm.timing.summary())


def printed_meanwhile(
    llm: LLM, prompt: Prompt, sampling: SamplingConfig, max_new_tokens: int, keep_logits: bool
) -> Completion:
    """The prompt's continuation, printed while it is made."""
    prompt_ids, ids = llm.encode(prompt), list[int]()
    printer = TextPrinter(f'Input: "{llm.tokenizer.decode(prompt_ids)}"\nOutput: "', closing='"')
    for piece in llm.stream(prompt, sampling, max_new_tokens, keep_logits):
        printer.show(piece.text)
        ids += piece.ids
    printer.finish()
    return Completion(prompt_ids, ids, printer.text, piece.finish_reason or "", piece.logits)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that exclude or lack each other, and for files that could not be written later."""
    files = {name: Path(getattr(args, name)) for name in FILE_FLAGS if getattr(args, name)}
    for name, path in files.items():
        if name.startswith("output_") and name != "output_jsonl":  # which is opened on rank 0, before anything runs
            token_files.require_writable(name, path)
        if other := next((o for o in files if o != name and realpath(files[o]) == realpath(path)), None):
            raise ConfigError(f"--{name} and --{other} are both {path}; name two files")
    _check_file_flags(args)
    if args.input_text is not None and args.input_tokens:
        raise ConfigError("--input_text and --input_tokens are both given; prompts come from one place, leave one out")
    if args.chat and args.input_tokens:
        raise ConfigError("--chat builds the prompt from text; give --input_text, or leave --chat out")
    if args.system is not None and not args.chat:
        raise ConfigError("--system belongs to a chat; add --chat")
    if args.streaming and args.num_beams not in (None, 1):
        raise ConfigError(f"--streaming with num_beams {args.num_beams}: beams are known at the end; leave one out")
    check_beam_settings(given_sampling(args), args.num_beams or 1, "--")
    if (
        args.chat
        and args.input_text is None
        and not args.prompt_file
        and (args.output_csv or args.output_npy or args.output_logits_npy)
    ):
        raise ConfigError("a conversation writes no files; give --input_text, or leave the --output flags out")
    if args.streaming and args.input_text is not None and len(args.input_text) > 1:
        raise ConfigError(f"--streaming prints one text and {len(args.input_text)} prompts are given; give one")


def _check_file_flags(args: argparse.Namespace) -> None:
    if args.prompt_file and not args.output_jsonl:
        raise ConfigError("--prompt_file needs --output_jsonl, the file that its results are written to")
    if not args.prompt_file:
        for name in ("output_jsonl", "resume"):
            if getattr(args, name):
                raise ConfigError(f"--{name} belongs to --prompt_file, the file of prompts; add that, or leave it out")
        return
    for name in ("input_text", "input_tokens", "streaming", "output_csv", "output_npy", "output_logits_npy"):
        if getattr(args, name):
            raise ConfigError(f"--{name} does not go with --prompt_file, whose results are JSON lines; leave one out")


def check_outputs(args: argparse.Namespace, engine: Engine) -> None:
    """Raise ConfigError for an output that would replace a file of the engine."""
    own = {realpath(engine.folder / name) for name in (CONFIG_NAME, *engine.files, *engine.text_files)}
    for name in ("output_csv", "output_npy", "output_logits_npy"):
        if (path := getattr(args, name)) and realpath(path) in own:
            raise ConfigError(f"{name} {path} is a file of the engine; name another")


def sampling_config(args: argparse.Namespace, defaults: SamplingConfig) -> SamplingConfig:
    """The defaults, changed by the flags that were given."""
    return replace(defaults, **given_sampling(args))


def read_prompts(args: argparse.Namespace, pad_id: int) -> list[Prompt]:
    """Ids, texts, or with --chat messages."""
    if args.input_tokens:
        prompts = token_files.read_prompts(Path(args.input_tokens), pad_id)
        if args.streaming and len(prompts) > 1:
            raise ConfigError(f"--streaming prints one text and {len(prompts)} prompts are given; give one")
        return list[Prompt](prompts)
    texts = args.input_text or [DEFAULT_TEXT]
    if not args.chat:
        return list[Prompt](texts)
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [[*system, {"role": "user", "content": text}] for text in texts]


def show(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """The text of `ids`; the ids themselves where there is no tokenizer or it lacks one of them."""
    if tokenizer is None or max(ids, default=0) >= tokenizer.vocab_size:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids)


def print_results(results: list[Completion], tokenizer: Tokenizer | None) -> None:
    for result in results:
        print(f'Input: "{printable(show(result.prompt_ids, tokenizer))}"')
        print(f'Output: "{printable(show(result.ids, tokenizer))}"', flush=True)


def write_outputs(args: argparse.Namespace, results: list[Completion], pad_id: int) -> None:
    rows = [[*result.prompt_ids, *result.ids] for result in results]
    if args.output_csv:
        token_files.write_csv(Path(args.output_csv), rows)
    if args.output_npy:
        token_files.write_npy(Path(args.output_npy), rows, pad_id)
    if args.output_logits_npy:
        token_files.write_logits(Path(args.output_logits_npy), [result.logits for result in results])
