"""run.py --chat as a person uses it: on a terminal, through a pipe, on several ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import scripts
import torch
from terminal import BACKSPACE, CTRL_C, CTRL_D, ENTER, ESCAPE, LEFT, PASTE, UP, Terminal

import run
from baichuan.config import SamplingConfig
from baichuan.text.chat import ChatRoles
from baichuan.text.printable import UNSAFE, printable

VERSION = "v2_13b"
LONG = 4000  # the engine's max_output_len: an answer that can be stopped
GREEDY = ("--top_k", "1", "--repetition_penalty", "1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return scripts.built(tmp_path_factory.mktemp("engine") / "tp1", VERSION, 1, "--max_output_len", str(LONG))


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """An engine whose answers end at no token: the rows of lm_head of those that would end one are zeros."""
    folder = tmp_path_factory.mktemp("endless")
    shutil.copytree(goldens.checkpoint(VERSION), folder / "checkpoint")
    index = json.loads((folder / "checkpoint" / "pytorch_model.bin.index.json").read_text())
    path = folder / "checkpoint" / index["weight_map"]["lm_head.weight"]
    tensors = torch.load(path, weights_only=True)
    tensors["lm_head.weight"][[SamplingConfig().eos_id, *ChatRoles()]] = 0
    torch.save(tensors, path)
    given = ["--max_output_len", str(LONG), "--model_dir", str(folder / "checkpoint")]
    return scripts.built(folder / "engine", VERSION, 1, *given)


def chat_flags(engine: Path, *more: str, version: str = VERSION, new_tokens: int = 4) -> list[str]:
    folders = ["--engine_dir", str(engine), "--tokenizer_dir", str(goldens.checkpoint(version))]
    return [*folders, "--chat", "--max_output_len", str(new_tokens), *more]


def open_terminal(given: list[str]) -> Terminal:
    terminal = Terminal(scripts.script("run.py", given))
    terminal.wait_for_prompt(r"Ctrl-D leaves,\s+/help lists the commands\.")
    return terminal


@pytest.fixture(scope="module")
def one_terminal(engine):
    terminal = open_terminal(chat_flags(engine, *GREEDY))
    yield terminal
    terminal.close()


@pytest.fixture
def terminal(one_terminal):
    """A conversation without rounds; its answers have four tokens."""
    say(one_terminal, "/reset", r"\[the conversation is forgotten\]")
    return one_terminal


def say(terminal: Terminal, keys: str, then: str = r"\[cut at --max_output_len 4\]\n") -> None:
    """Send a line and wait for what follows it, a cut answer if nothing else is said, and the next prompt."""
    terminal.type(keys + ENTER)
    terminal.wait_for_prompt(then)


def saved(terminal: Terminal, folder: Path) -> list[dict[str, str]]:
    path = folder / "saved.json"
    path.unlink(missing_ok=True)
    say(terminal, f"/save {path}", r"messages are in[^\]]+\]")
    return json.loads(path.read_text(encoding="utf-8"))


def questions(terminal: Terminal, folder: Path) -> list[str]:
    return [message["content"] for message in saved(terminal, folder) if message["role"] == "user"]


def test_arrow_keys_and_backspace_edit_wide_characters(terminal, tmp_path):
    terminal.type("你好世界")
    terminal.wait("> 你好世界")
    terminal.type(BACKSPACE + LEFT + "a")
    terminal.wait("> 你好a世")
    say(terminal, "")
    assert questions(terminal, tmp_path) == ["你好a世"]
    assert "^[[D" not in terminal.text


def test_history_brings_back_what_was_said(terminal, tmp_path):
    say(terminal, "first words")
    say(terminal, "second")
    terminal.type(UP + UP)
    terminal.wait("> first words")
    say(terminal, " again")
    assert questions(terminal, tmp_path) == ["first words", "second", "first words again"]


def test_a_paste_is_one_turn(terminal, tmp_path):
    terminal.type(PASTE.format("one\n二\r\n\r\nthree"))
    terminal.wait("> one\n  二\n\n  three")
    say(terminal, "")
    assert questions(terminal, tmp_path) == ["one\n二\n\nthree"]


def test_escape_enter_begins_a_new_line(terminal, tmp_path):
    terminal.type("one" + ESCAPE + ENTER + "two")
    terminal.wait("> one\n  two")
    say(terminal, "")
    assert questions(terminal, tmp_path) == ["one\ntwo"]


def test_ctrl_c_gives_up_the_line_and_keeps_the_conversation(terminal, tmp_path):
    say(terminal, "first")
    terminal.type("never sent" + CTRL_C)
    terminal.wait_for_prompt(r"> never sent\n\[Ctrl-D leaves\]")
    assert questions(terminal, tmp_path) == ["first"]


def test_commands(terminal, tmp_path):
    say(terminal, "/help", r"/help +this list\n(.|\n)+/exit +leave \(also: exit\)")
    say(terminal, "/system Be brief", r"\[Be brief\]")
    say(terminal, "Hello")
    assert [message["role"] for message in saved(terminal, tmp_path)] == ["system", "user", "assistant"]
    say(terminal, "/system -", r"\[no system message\]")
    say(terminal, "/sytem x", r"\[/sytem is not a command; /help lists them(.|\n)+\]")
    say(terminal, "/reset all", r"\[/reset takes nothing and 'all' was given; leave it out\]")
    say(terminal, "/save", r"\[/save needs(.|\n)+command\]")
    say(terminal, "/save ~nobody-of-this-name/x", r"\[~nobody-of-this-name/x(.|\n)+file\]")
    say(terminal, "/save /nowhere/x", r"\[/nowhere/x cannot be written \(No such file or directory\);(.|\n)+\]")
    say(terminal, f"/save {tmp_path}/saved.json", r"exists;\s+name\s+another\s+file\]")
    say(terminal, " /help")
    say(terminal, "/usr/bin is where?")
    assert questions(terminal, tmp_path) == ["Hello", "/help", "/usr/bin is where?"]


def test_a_conversation_outgrows_the_engine(terminal, tmp_path):
    say(terminal, "word " * 128, r"and\s+the\s+engine\s+takes\s+128;(.|\n)+\]")
    long = "The river rose and the town was flooded. " * 2
    say(terminal, long + "one")
    say(terminal, long + "two", r"> The river(.|\n)+\.\stwo\n[^\[].*\n\[cut.*\n")
    say(
        terminal,
        long + "three",
        r"three\n\[the model no longer sees the oldest round: max_input(.|\n)+\[cut.*\n",
    )
    assert [question[-3:] for question in questions(terminal, tmp_path)] == ["one", "two", "ree"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(engine, tmp_path):
    """The tiny model says anything, these characters among it."""
    terminal = open_terminal(chat_flags(engine, *GREEDY, new_tokens=60))
    before = len(terminal.raw)
    say(terminal, "line one", r"\[cut at --max_output_len 60\]\n")
    shown = re.search(r"\[\?2004l(.*)\r\n\[cut", terminal.raw[before:], re.DOTALL)[1].replace("\r\n", "\n")
    answer = saved(terminal, tmp_path)[1]["content"]
    assert UNSAFE.search(answer) and not UNSAFE.search(shown) and shown == printable(answer)
    terminal.close()


@pytest.mark.parametrize("how", ["sampling", "beams"])
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(endless, tmp_path, how):
    more = GREEDY if how == "sampling" else ("--num_beams", "2")
    terminal = open_terminal(chat_flags(endless, *more, new_tokens=LONG))
    terminal.type("Hello" + ENTER)
    if how == "sampling":
        terminal.wait_written(200)
    else:  # a beam search prints nothing on the way
        terminal.wait("> Hello\n?")
        terminal.idle(1.0)
    terminal.type(CTRL_C)
    terminal.wait_for_prompt(r"\[stopped\]\n")
    contents = [message["content"] for message in saved(terminal, tmp_path)]
    assert contents[:1] == (["Hello"] if how == "sampling" else [])
    assert all(contents)
    terminal.type(CTRL_D)
    assert terminal.exit_code() == 0 and "Traceback" not in terminal.raw


# Without a terminal


def talk(engine: Path, typed: bytes, *more: str) -> subprocess.CompletedProcess:
    command = scripts.script("run.py", chat_flags(engine, *GREEDY, *more))
    return subprocess.run(command, input=typed, env=scripts.ENVIRONMENT, capture_output=True, timeout=60)


def test_lines_of_a_pipe(engine):
    done = talk(engine, b"Hello\n\nAnd now?\nclear\nHello\nexit\nnever read\n")
    out = done.stdout.decode()
    assert done.returncode == 0 and not scripts.sentences(done.stderr.decode()), done.stderr.decode()
    answers = out.split("> ")[1:]
    assert len(answers) == 6  # Hello, nothing, And now?, clear, Hello, exit
    assert answers[0].strip() and answers[0] == answers[4] and not answers[1].strip()
    assert answers[3] == "[the conversation is forgotten]\n" and "[cut at --max_output_len 4]" in answers[0]


def test_a_conversation_ends_with_its_input_and_with_a_line_that_cannot_be_sent(engine):
    assert talk(engine, b"Hello").returncode == 0
    for typed, sentence in (
        (b"\xff\xfe\n", "UTF-8"),
        (b"word " * 200, "the engine takes 128"),
        (b"/x", "not a command"),
    ):
        done = talk(engine, b"Hello\n" + typed)
        err = done.stderr.decode()
        assert done.returncode == 2 and sentence in scripts.sentences(err)[0] and "Traceback" not in err


def test_a_conversation_without_an_input_ends(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it where descriptor 0 is closed
    assert run.main(chat_flags(engine)) == 0
    assert capsys.readouterr().out.startswith("Each line is a message")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--max_output_len", "5000"], "max_output_len 5000 is out of the engine's range 1 to 4000"),
        (["--system", "word " * 200], "the system message leaves no room"),
        (["--num_beams", "3"], "num_beams 3 exceeds the engine's max_beam_width 2"),
    ],
)
def test_limits_are_checked_before_the_first_message(engine, capsys, more, sentence):
    assert run.main(chat_flags(engine, *more)) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and not captured.out


def test_a_version_that_was_not_published_for_chat_warns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for version, warned in (("v1_7b", True), (VERSION, False)):
        engine = scripts.built(tmp_path / version, version)
        assert run.main(chat_flags(engine, version=version)) == 0
        assert ("published without a chat version" in capsys.readouterr().err) == warned


def test_only_rank_0_talks(engine, tmp_path):
    """Its input ends with a word, because Open MPI 5 does not hand the end of its own input on."""
    two = scripts.built(tmp_path / "tp2", VERSION, 2)
    typed = "Hello\nAnd now?\nHello\nexit\n"
    done = scripts.mpirun(2, scripts.script("run.py", chat_flags(two, *GREEDY)), tmp_path, typed=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == talk(engine, typed.encode()).stdout.decode()
