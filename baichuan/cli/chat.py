"""A conversation with an engine: questions are read and answers printed by rank 0, every rank computes."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from baichuan.cli.terminal import EditorReader, LineReader, Stopped, TextPrinter, open_reader
from baichuan.config import SamplingConfig
from baichuan.errors import BaichuanError, ConfigError
from baichuan.generation.conversation import Conversation
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator
from baichuan.text.chat import ChatRoles
from baichuan.text.printable import printable
from baichuan.text.tokenizer import Tokenizer
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


def chat(
    session: Session,
    tokenizer: Tokenizer,
    roles: ChatRoles,
    sampling: SamplingConfig,
    max_new_tokens: int,
    system: str | None,
    comm: Communicator,
    started_s: float,
) -> None:
    """Answer what is typed until the end of input.

    started_s: the time.monotonic() from which the time until the first question counts.
    Raises ConfigError, before the first question, for limits that the engine cannot hold.
    """
    conversation = Conversation(tokenizer, roles, session.build.max_input_len, system)
    session.check([conversation.ask("")], sampling, max_new_tokens)
    session.warm_up([conversation.ask("")], sampling, max_new_tokens)
    logger.info("ready in %.1f s", time.monotonic() - started_s)
    if comm.rank == 0:
        if session.model.model_version == "v1_7b":
            logger.warning(
                "Baichuan-7B was published without a chat version; one that was not tuned for chat only continues text"
            )
        with open_reader(comm.world_size) as reader:
            _Chat(session, tokenizer, conversation, sampling, max_new_tokens, comm, reader).run()
        comm.broadcast_object(None)
        return
    while (request := comm.broadcast_object(None)) is not None:
        prompt, sampling = request
        session.generate([prompt], sampling, max_new_tokens)


@dataclass
class _Chat:
    """Rank 0's side."""

    session: Session
    tokenizer: Tokenizer
    conversation: Conversation
    sampling: SamplingConfig
    max_new_tokens: int
    comm: Communicator
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
        self.session.check([prompt], self.sampling, self.max_new_tokens)
        if more := self.conversation.left_out - left_out:
            limit = self.session.build.max_input_len
            _notice(f"the model no longer sees the {more} oldest round(s): max_input_len is {limit} tokens")
        self.comm.broadcast_object((prompt, self.sampling))
        answer, ending = self._generate(prompt)
        self.sampling = replace(self.sampling, random_seed=self.sampling.random_seed + 1)
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
        steps = self.sampling.num_beams == 1  # with beam search the tokens are known only at the end
        printer = TextPrinter(self.tokenizer)
        try:
            with self.reader.answering(at_once=not steps) as stopped:

                def push(tokens: list[int | None]) -> None:
                    printer.push(tokens)
                    if stopped():
                        raise Stopped

                session, on_tokens = self.session, push if steps else None
                [result] = session.generate([prompt], self.sampling, self.max_new_tokens, on_tokens)
                ending = result.finish_reason
                for token in [] if steps else result.ids:
                    printer.push([token])
        except Stopped:
            ending = "stopped"
        printer.finish()
        return printer.text, ending

    def _save(self, name: str) -> None:
        """The messages as a JSON array."""
        path = Path(name).expanduser()
        if not name or path.exists():
            raise ConfigError(f"{path} exists; name another file" if name else "/save needs a file's name")
        try:
            with atomic_path(path) as temporary:
                text = json.dumps(self.conversation.messages, ensure_ascii=False, indent=1)
                temporary.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); name another file") from None
        _notice(f"{len(self.conversation.messages)} messages are in {path}")


def _notice(text: str) -> None:
    """Print a line that is not the model's answer."""
    print(f"[{printable(text)}]", flush=True)
