"""A conversation: its messages, and how many of them fit in an engine's prompt."""

from __future__ import annotations

from baichuan.errors import ConfigError
from baichuan.text.chat import ChatRoles, build_chat_prompt
from baichuan.text.tokenizer import Tokenizer

Message = dict[str, str]  # role: "system" | "user" | "assistant"; content: its text


class Conversation:
    """Rounds, each a question and its answer.  A prompt holds the newest rounds that fit in max_input_len tokens.

    Raises ConfigError where the system message alone leaves no room for a question.
    """

    def __init__(self, tokenizer: Tokenizer, roles: ChatRoles, max_input_len: int, system: str | None = None):
        self._tokenizer, self._roles, self._max_input_len = tokenizer, roles, max_input_len
        self._rounds: list[tuple[Message, Message]] = []
        self._first = 0  # index of the oldest round that the prompts still hold
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Replace the system message from the next question on; None = no system message."""
        length = len(self._encode(text, [], ""))
        if length >= self._max_input_len:
            raise ConfigError(
                f"the system message leaves no room: it takes {length} of the engine's max_input_len "
                f"{self._max_input_len} tokens; shorten it, or build with a larger --max_input_len"
            )
        self.system = text

    def ask(self, question: str) -> list[int]:
        """The prompt's ids; the oldest rounds are left out where not all rounds fit.

        Raises ConfigError where the question alone is too long.
        """
        first = self._first
        while len(ids := self._encode(self.system, self._rounds[first:], question)) > self._max_input_len:
            if first == len(self._rounds):
                raise ConfigError(
                    f"the message makes a prompt of {len(ids)} tokens and the engine takes {self._max_input_len}; "
                    "shorten it, or build with a larger --max_input_len"
                )
            first += 1
        self._first = first
        return ids

    def add_round(self, question: str, answer: str) -> None:
        self._rounds.append(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))

    def reset(self) -> None:
        """Forget the rounds; the system message stays."""
        self._rounds, self._first = [], 0

    @property
    def left_out(self) -> int:
        """The number of oldest rounds that no longer fit."""
        return self._first

    @property
    def messages(self) -> list[Message]:
        """All messages, including the rounds that no longer fit."""
        return _messages(self.system, self._rounds)

    def _encode(self, system: str | None, rounds: list[tuple[Message, Message]], question: str) -> list[int]:
        messages = [*_messages(system, rounds), {"role": "user", "content": question}]
        return build_chat_prompt(self._tokenizer, messages, *self._roles)


def _messages(system: str | None, rounds: list[tuple[Message, Message]]) -> list[Message]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [message for each in rounds for message in each]
