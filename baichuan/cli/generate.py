"""What run.py does: prompts in, text or ids out."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from baichuan.cli.chat import chat as converse
from baichuan.cli.common import check_device
from baichuan.cli.run_flags import DEFAULT_TEXT, FILE_FLAGS, SAMPLING_FLAGS
from baichuan.cli.terminal import TextPrinter
from baichuan.config import SamplingConfig
from baichuan.engine.folder import check_world, read_engine
from baichuan.engine.runtime import open_session
from baichuan.engine.text import open_text, require_text
from baichuan.errors import ConfigError
from baichuan.generation import token_files
from baichuan.generation.decoding import Generation
from baichuan.generation.limits import check_requests
from baichuan.parallel.comm import Communicator
from baichuan.text import chat
from baichuan.text.printable import printable
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.hub.checkpoint import resolve_tokenizer

logger = logging.getLogger(__name__)


def generate(args: argparse.Namespace, comm: Communicator) -> int:
    check_flags(args)
    check_device(args, comm)
    sampling_config(args, SamplingConfig())  # its errors come before the engine is read
    engine = read_engine(Path(args.engine_dir))
    check_world(engine, comm, args.model_version)
    text = open_text(engine, resolve_tokenizer(args.tokenizer_dir) if args.tokenizer_dir else None)
    tokenizer = text.tokenizer if args.input_tokens and not args.streaming else require_text(engine, text)
    sampling = sampling_config(args, text.sampling)
    roles = text.roles() if args.chat else None
    if roles:
        sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *roles))
    conversation = roles and args.input_text is None
    prompts = [[0]] if conversation else read_prompts(args, tokenizer, roles, sampling.pad_id)
    check_requests(engine.model, engine.build, prompts, sampling, args.max_output_len)  # before weights are loaded
    session = open_session(engine.folder, comm, args.model_version, not args.no_weight_copies, args.device)
    if roles and args.input_text is None:
        converse(
            session, require_text(engine, text), roles, sampling, args.max_output_len, args.system, comm, args.started_s
        )
        return 0
    session.warm_up(prompts, sampling, args.max_output_len)
    logger.info("ready in %.1f s", time.monotonic() - args.started_s)
    stream = None
    if args.streaming and comm.rank == 0:
        own = require_text(engine, text)
        stream = TextPrinter(own, opening=f'Input: "{own.decode(prompts[0])}"\nOutput: "', closing='"')
    on_tokens = stream.push if stream else None
    results = session.generate(prompts, sampling, args.max_output_len, on_tokens, bool(args.output_logits_npy))
    if comm.rank == 0:
        if stream:
            stream.finish()
        else:
            print_results(prompts, results, tokenizer)
        write_outputs(args, prompts, results, sampling.pad_id)
        for index, result in enumerate(results):
            logger.info("prompt %d: %d new tokens, finish reason %s", index, len(result.ids), result.finish_reason)
        logger.info("%s", session.timing.summary())
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that exclude or lack each other, and for files that could not be written later."""
    files = {name: Path(getattr(args, name)) for name in FILE_FLAGS if getattr(args, name)}
    for name, path in files.items():
        if name != "input_tokens":
            token_files.require_writable(name, path)
        if other := next((o for o in files if o != name and files[o].resolve() == path.resolve()), None):
            raise ConfigError(f"--{name} and --{other} are both {path}; name two files")
    if args.input_text is not None and args.input_tokens:
        raise ConfigError("--input_text and --input_tokens are both given; prompts come from one place, leave one out")
    if args.chat and args.input_tokens:
        raise ConfigError("--chat builds the prompt from text; give --input_text, or leave --chat out")
    if args.system is not None and not args.chat:
        raise ConfigError("--system belongs to a chat; add --chat")
    if args.streaming and args.num_beams not in (None, 1):
        raise ConfigError(f"--streaming with num_beams {args.num_beams}: beams are known at the end; leave one out")
    for name in ("top_k", "top_p", "random_seed"):
        if args.num_beams not in (None, 1) and getattr(args, name) is not None:
            raise ConfigError(f"num_beams {args.num_beams} searches and does not sample; leave --{name} out")
    if args.length_penalty is not None and args.num_beams in (None, 1):
        raise ConfigError(f"length_penalty {args.length_penalty} belongs to beam search; add --num_beams")
    if args.chat and args.input_text is None and (args.output_csv or args.output_npy or args.output_logits_npy):
        raise ConfigError("a conversation writes no files; give --input_text, or leave the --output flags out")
    if args.streaming and args.input_text is not None and len(args.input_text) > 1:
        raise ConfigError(f"--streaming prints one text and {len(args.input_text)} prompts are given; give one")


def sampling_config(args: argparse.Namespace, defaults: SamplingConfig) -> SamplingConfig:
    """The defaults, changed by the flags that were given."""
    given = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    return replace(defaults, **given)


def read_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, roles: chat.ChatRoles | None, pad_id: int
) -> list[list[int]]:
    """Every prompt's ids; with roles, each text is a user's message."""
    if args.input_tokens:
        prompts = token_files.read_prompts(Path(args.input_tokens), pad_id)
        if args.streaming and len(prompts) > 1:
            raise ConfigError(f"--streaming prints one text and {len(prompts)} prompts are given; give one")
        return prompts
    assert tokenizer is not None, "texts have required one"
    texts = args.input_text or [DEFAULT_TEXT]
    if roles is None:
        return [tokenizer.encode(text) for text in texts]
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [chat.build_chat_prompt(tokenizer, [*system, {"role": "user", "content": text}], *roles) for text in texts]


def show(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """The text of `ids`; the ids themselves where there is no tokenizer or it lacks one of them."""
    if tokenizer is None or max(ids, default=0) >= tokenizer.vocab_size:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids)


def print_results(prompts: list[list[int]], results: list[Generation], tokenizer: Tokenizer | None) -> None:
    for prompt, result in zip(prompts, results, strict=True):
        print(f'Input: "{printable(show(prompt, tokenizer))}"')
        print(f'Output: "{printable(show(result.ids, tokenizer))}"', flush=True)


def write_outputs(args: argparse.Namespace, prompts, results: list[Generation], pad_id: int) -> None:
    rows = [[*prompt, *result.ids] for prompt, result in zip(prompts, results, strict=True)]
    if args.output_csv:
        token_files.write_csv(Path(args.output_csv), rows)
    if args.output_npy:
        token_files.write_npy(Path(args.output_npy), rows, pad_id)
    if args.output_logits_npy:
        token_files.write_logits(Path(args.output_logits_npy), results)
