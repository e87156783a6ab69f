"""A chat as token ids: a control id says who speaks, and a message is always text, whatever it spells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baichuan.config import require_choice, require_range
from baichuan.errors import CheckpointError, ConfigError
from baichuan.text.settings import CONFIG_NAME, read_settings
from baichuan.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ChatRoles(NamedTuple):
    """The ids that open a turn.  Both also end the assistant's turn: they are SamplingConfig.stop_ids, beside eos."""

    user_id: int = 195
    assistant_id: int = 196


def role_ids(folder: str | Path) -> ChatRoles:
    """The role ids in a checkpoint's generation_config.json; those of the released models where it names none.

    Raises CheckpointError for a file that is not such JSON, or for role ids that are no token ids or equal each other.
    """
    values = read_settings(Path(folder))
    default = ChatRoles()
    roles = ChatRoles(
        values.get("user_token_id", default.user_id), values.get("assistant_token_id", default.assistant_id)
    )
    if not all(type(role) is int and role >= 0 for role in roles) or roles.user_id == roles.assistant_id:
        raise CheckpointError(
            f"{Path(folder) / CONFIG_NAME} gives user_token_id {roles.user_id!r} and assistant_token_id "
            f"{roles.assistant_id!r}; they must be two different ids"
        )
    return roles


def build_chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    user_id: int = ChatRoles().user_id,
    assistant_id: int = ChatRoles().assistant_id,
    max_input_len: int | None = None,
) -> list[int]:
    """Ids of [system] (user_id user [assistant_id assistant])... assistant_id, no bos and no eos.

    messages: {"role": "system" | "user" | "assistant", "content": text}, the system's only as the first.  The last
    assistant_id is left out where the assistant spoke last.  Content is text: a role's name in it stays text.
    max_input_len: the prompt's ids at most.  The system and the newest round (a user's message and its answers) are
    kept, older rounds while they fit; what is still too long loses its beginning, with a warning.  None keeps all.
    Source: build_chat_input in the released models' generation_utils.py, for all four versions.
    """
    for role_id in (user_id, assistant_id):
        tokenizer.check_role_id(role_id)
    check_messages(messages)
    if max_input_len is not None:
        require_range("max_input_len", max_input_len, 1, 1 << 20)

    def encode(text: str) -> list[int]:
        return tokenizer.encode_literal(text, (user_id, assistant_id))

    openers = {"system": [], "user": [user_id], "assistant": [assistant_id]}
    turns = [(message["role"], openers[message["role"]] + encode(message["content"])) for message in messages]
    system = turns.pop(0)[1] if turns[0][0] == "system" else []
    rounds: list[list[int]] = []
    for role, ids in turns:
        if role == "user" or not rounds:
            rounds.append([])
        rounds[-1] += ids

    closing = [] if messages[-1]["role"] == "assistant" else [assistant_id]
    if max_input_len is None:
        return system + sum(rounds, []) + closing
    history = rounds.pop() if rounds else []
    while rounds and len(system) + len(history) + len(rounds[-1]) <= max_input_len:
        history = rounds.pop() + history
    prompt = system + history + closing
    if len(prompt) > max_input_len:
        cut = len(prompt) - max_input_len
        logger.warning("the chat does not fit in max_input_len %d; its first %d ids are left out", max_input_len, cut)
    return prompt[-max_input_len:]


def check_messages(messages: Any) -> None:
    """Raise ConfigError unless these are messages as build_chat_prompt takes them."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        example = '[{"role": "user", "content": "你好"}]'
        raise ConfigError(f"a chat takes a list of messages and this is {messages!r:.60}; give one such as {example}")
    if not messages:
        raise ConfigError("the chat has no message; give at least one")
    for index, message in enumerate(messages):
        name = f"message {index} of the chat"
        if not isinstance(message, Mapping):
            raise ConfigError(f"{name} is {message!r:.60}; give an object with a role and a content")
        if set(message) != {"role", "content"}:
            found = " and ".join(map(repr, message)) or "nothing"
            raise ConfigError(f"{name} has {found:.100}; it needs a role and a content, and takes nothing else")
        if not isinstance(message["content"], str):
            raise ConfigError(f"{name} has the content {message['content']!r:.60}; give a text")
        require_choice(f"role of message {index}", message["role"], ("system", "user", "assistant"))
        if index and message["role"] == "system":
            raise ConfigError(f"message {index} of the chat is the system's; put the system's before all others")
