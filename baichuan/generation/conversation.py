"""Text on a terminal as it is made, and a conversation."""

from __future__ import annotations

import sys
from dataclasses import replace

from baichuan.config import SamplingConfig
from baichuan.errors import ConfigError
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator
from baichuan.text.chat import ChatRoles, build_chat_prompt
from baichuan.text.tokenizer import Tokenizer


class TextPrinter:
    """Prints one sequence's tokens as text; push is a session's on_tokens."""

    def __init__(self, tokenizer: Tokenizer, opening: str = "", closing: str = ""):
        self._stream, self._closing = tokenizer.stream(), closing
        print(opening, end="", flush=True)

    def push(self, tokens: list[int | None]) -> None:
        if tokens[0] is not None:
            print(self._stream.push(tokens[0]), end="", flush=True)

    def finish(self) -> None:
        print(self._stream.finish() + self._closing, flush=True)


def converse(
    session: Session,
    tokenizer: Tokenizer,
    roles: ChatRoles,
    sampling: SamplingConfig,
    max_new_tokens: int,
    system: str | None,
    comm: Communicator,
) -> None:
    """Answer the lines of standard input until it ends or says `exit`; rank 0 reads and prints, every rank computes.

    Older rounds leave the prompt when it outgrows the engine.
    """
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    budget = session.build.max_input_len
    if comm.rank == 0:
        print("Type a message; `clear` starts anew, `exit` or the end of input leaves.")
    while (line := _read_line(comm)) not in (None, "exit"):
        if line == "clear":
            messages = list(opening)
        if line in ("", "clear"):
            continue
        messages.append({"role": "user", "content": line})
        prompt = build_chat_prompt(tokenizer, messages, *roles, max_input_len=budget)
        printer = TextPrinter(tokenizer) if comm.rank == 0 and sampling.num_beams == 1 else None
        ids = session.generate([prompt], sampling, max_new_tokens, printer and printer.push)[0].ids
        if printer:
            printer.finish()
        elif comm.rank == 0:
            print(tokenizer.decode(ids), flush=True)
        messages.append({"role": "assistant", "content": tokenizer.decode(ids)})
        sampling = replace(sampling, random_seed=sampling.random_seed + 1)


def _read_line(comm: Communicator) -> str | None:
    """Rank 0's next line on every rank, None at the end of input."""
    line = None
    if comm.rank == 0 and sys.stdin:  # None where the program was started without one
        try:
            line = input("> ").strip()
        except EOFError:
            print()
        except UnicodeDecodeError:
            raise ConfigError("what was typed is not valid UTF-8; set the terminal to UTF-8") from None
    return comm.broadcast_object(line)
