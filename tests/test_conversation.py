"""Conversation: which rounds a prompt holds."""

from __future__ import annotations

import pytest
from tokenizer_files import tokenizer

from baichuan.errors import ConfigError
from baichuan.generation.conversation import Conversation
from baichuan.text.chat import ChatRoles, build_chat_prompt
from baichuan.text.printable import printable

QUESTION, ANSWER = "How high is the second highest mountain?", "8611 metres."


def prompt(messages: list[dict[str, str]], question: str) -> list[int]:
    return build_chat_prompt(tokenizer("tiny_v2"), [*messages, {"role": "user", "content": question}])


def conversation(max_input_len: int, system: str | None = None) -> Conversation:
    return Conversation(tokenizer("tiny_v2"), ChatRoles(), max_input_len, system)


def test_a_prompt_holds_the_system_message_and_every_round():
    talk = conversation(1000, "Be brief.")
    talk.add_round(QUESTION, ANSWER)
    assert talk.ask("And the highest?") == prompt(talk.messages, "And the highest?")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.set_system(None)
    assert talk.ask("And?") == prompt(talk.messages, "And?") and talk.messages[0]["role"] == "user"
    talk.reset()
    assert talk.messages == [] and talk.ask(QUESTION) == prompt([], QUESTION)


def test_only_the_oldest_rounds_that_do_not_fit_are_left_out():
    talk = conversation(1000, "Be brief.")
    for _ in range(4):
        talk.add_round(QUESTION, ANSWER)
    rounds = talk.messages[1:]
    for left_out in range(5):
        expected = prompt([talk.messages[0], *rounds[2 * left_out :]], QUESTION)
        tight = conversation(len(expected), "Be brief.")
        for _ in range(4):
            tight.add_round(QUESTION, ANSWER)
        assert tight.ask(QUESTION) == expected and tight.left_out == left_out
        assert tight.messages == talk.messages  # to be saved
    tight.reset()
    assert tight.left_out == 0


def test_a_question_that_alone_is_too_long_is_refused_and_changes_nothing():
    talk = conversation(30)
    talk.add_round("a", "b")
    with pytest.raises(ConfigError, match="the engine takes 30; shorten it"):
        talk.ask(QUESTION * 5)
    assert talk.ask("c") == prompt(talk.messages, "c") and talk.left_out == 0


def test_a_system_message_that_leaves_no_room_is_refused():
    length = len(prompt([{"role": "system", "content": QUESTION}], ""))
    conversation(length + 1, QUESTION).ask("")
    with pytest.raises(ConfigError, match=f"takes {length} of the engine's max_input_len {length} tokens"):
        conversation(length, QUESTION)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("世界 é\t\n👩‍🚀", "世界 é\t\n👩‍🚀"),
        ("\x1b[2J\x9b1A", "\\x1b[2J\\x9b1A"),
        ("a\rb\x08\x00\x7f", "a\\rb\\x08\\x00\\x7f"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("a\udc80", "a\\udc80"),
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert printable(text) == shown
