"""A conversation with an engine: questions are read and answers printed by rank 0, every rank computes."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from baichuan.api.llm import LLM
from baichuan.cli.terminal import EditorReader, LineReader, Stopped, TextPrinter, open_reader
from baichuan.config import SEEDS, SamplingConfig
from baichuan.errors import BaichuanError, ConfigError
from baichuan.generation.conversation import Conversation
from baichuan.text.printable import printable
from baichuan.util.files import atomic_path

logger = logging.getLogger(__name__)

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
WORDS = {"clear": "/reset", "exit": "/exit"}  # as in the released models' own demo
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation (also: clear)",
    "/system TEXT": "tell the model TEXT first; alone shows it, - removes it",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave (also: exit)",
}


def chat(llm: LLM, sampling: SamplingConfig, max_new_tokens: int, system: str | None, started_s: float) -> None:
    """Answer what is typed until the end of input.  Called on rank 0, in llm.lead.

    started_s: the time.monotonic() from which the time until the first question counts.
    """
    conversation = open_conversation(llm, system)
    llm.warm_up([conversation.ask("")], sampling, max_new_tokens)
    logger.info("ready in %.1f s", time.monotonic() - started_s)
    if llm.engine.model.model_version == "v1_7b":
        logger.warning(
            "Baichuan-7B was published without a chat version; one that was not tuned for chat only continues text"
        )
    with open_reader(llm.ranks.comm.world_size) as reader:
        _Chat(llm, conversation, sampling, max_new_tokens, reader).run()


def open_conversation(llm: LLM, system: str | None) -> Conversation:
    """Raises ConfigError for a system message that leaves no room in the engine's prompts."""
    return Conversation(llm.tokenizer, llm.roles, llm.engine.build.max_input_len, system)


@dataclass
class _Chat:
    """A conversation and its settings."""

    llm: LLM
    conversation: Conversation
    sampling: SamplingConfig
    max_new_tokens: int
    reader: LineReader | EditorReader

    def run(self) -> None:
        print(f"{self.reader.keys}, /help lists the commands.", flush=True)
        while (turn := self.reader.read()) is not None:
            try:
                if not self._turn(turn):
                    return
            except BaichuanError as error:
                if not self.reader.interactive:
                    raise
                _notice(str(error))

    def _turn(self, turn: str) -> bool:
        """Answer a message or obey a command; False to leave."""
        turn = WORDS.get(turn.strip(), turn)
        if command := COMMAND.fullmatch(turn.rstrip()):
            return self._obey(*command.groups(default=""))
        if turn.strip():
            self._answer(turn.strip())
        return True

    def _obey(self, name: str, value: str) -> bool:
        takes_value = {command[1:].split()[0]: " " in command for command in COMMANDS}
        if name not in takes_value:
            raise ConfigError(f"/{name} is not a command; /help lists them, and a space before it makes it a message")
        if value and not takes_value[name]:
            raise ConfigError(f"/{name} takes nothing and {value!r} was given; leave it out")
        match name:
            case "help":
                print("".join(f"  {command:14}{text}\n" for command, text in COMMANDS.items()), end="", flush=True)
            case "reset":
                self.conversation.reset()
                _notice("the conversation is forgotten")
            case "system":
                if value:
                    self.conversation.set_system(None if value == "-" else value)
                _notice("no system message" if self.conversation.system is None else self.conversation.system)
            case "save":
                self._save(value)
        return name != "exit"

    def _answer(self, question: str) -> None:
        left_out = self.conversation.left_out
        prompt = self.conversation.ask(question)
        if more := self.conversation.left_out - left_out:
            limit = self.llm.engine.build.max_input_len
            oldest = "oldest round" if more == 1 else f"{more} oldest rounds"
            _notice(f"the model no longer sees the {oldest}: max_input_len is {limit} tokens")
        answer, ending = self._generate(prompt)
        self.sampling = replace(self.sampling, random_seed=(self.sampling.random_seed + 1) % SEEDS)
        if answer or ending != "stopped":
            self.conversation.add_round(question, answer)
        if ending == "stopped":
            _notice("stopped")
        if ending == "length":
            _notice(f"cut at --max_output_len {self.max_new_tokens}")
        if self.reader.interactive:
            print(flush=True)

    def _generate(self, prompt: list[int]) -> tuple[str, str]:
        """The answer, printed as it is made, and what ended it: stop | length | stopped."""
        printer, ending = TextPrinter(), "stopped"
        try:
            with self.reader.answering() as stopped:
                for piece in self.llm.stream(prompt, self.sampling, self.max_new_tokens, stopped=stopped):
                    printer.show(piece.text)
                    ending = piece.finish_reason or ending
        except Stopped:
            ending = "stopped"
        printer.finish()
        return printer.text, "stopped" if ending == "cancelled" else ending

    def _save(self, name: str) -> None:
        """The messages as a JSON array."""
        if not name:
            raise ConfigError("/save needs a file's name; write it behind the command")
        path = Path(os.path.expanduser(name))  # Path's own raises where a user is unknown
        try:
            if path.exists():
                raise ConfigError(f"{path} exists; name another file")
            with atomic_path(path) as temporary:
                text = json.dumps(self.conversation.messages, ensure_ascii=False, indent=1)
                temporary.write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{path} cannot be written ({why}); name another file") from None
        _notice(f"{len(self.conversation.messages)} messages are in {path}")


def _notice(text: str) -> None:
    """Print a line that is not the model's answer."""
    print(f"[{printable(text)}]", flush=True)
