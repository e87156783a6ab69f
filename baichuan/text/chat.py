"""A chat as token ids: a control id says who speaks, and a message is always text, whatever it spells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from baichuan.config import require_choice
from baichuan.errors import CheckpointError, ConfigError
from baichuan.text.settings import CONFIG_NAME, read_settings
from baichuan.text.tokenizer import Tokenizer


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
) -> list[int]:
    """Ids of [system] (user_id user [assistant_id assistant])... assistant_id, no bos and no eos.

    messages: {"role": "system" | "user" | "assistant", "content": text}, the system's only as the first.  The last
    assistant_id is left out where the assistant spoke last.  Content is text: a role's name in it stays text.
    Source: build_chat_input in the released models' generation_utils.py, for all four versions, which also cuts a chat
    that is too long; generation/conversation.py leaves out rounds instead.
    """
    for role_id in (user_id, assistant_id):
        tokenizer.check_role_id(role_id)
    _check_messages(messages)
    openers = {"system": [], "user": [user_id], "assistant": [assistant_id]}
    prompt: list[int] = []
    for message in messages:
        prompt += openers[message["role"]] + tokenizer.encode_literal(message["content"], (user_id, assistant_id))
    return prompt if messages[-1]["role"] == "assistant" else [*prompt, assistant_id]


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise ConfigError("the chat has no message; give at least one")
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise ConfigError(f"message {index} of the chat needs a role and a content that is text")
        require_choice(f"role of message {index}", message["role"], ("system", "user", "assistant"))
        if index and message["role"] == "system":
            raise ConfigError(f"message {index} of the chat is the system's; put the system's before all others")
