"""run.py --prompt_file: a file of prompts in, JSON lines out, stopped and taken up again."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time

import goldens
import pytest
import scripts

import run
from baichuan.api.result_file import START, result_file
from baichuan.cli import batch
from baichuan.errors import ConfigError
from baichuan.util.progress import Progress

VERSION = "v1_7b"
LIMITS = ["--max_output_len", "24"]
GREEDY = ["--top_k", "1", "--repetition_penalty", "1"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return scripts.built(tmp_path_factory.mktemp("engine") / "engine", VERSION)


def golden_rows(times: int = 2) -> list[dict]:
    ids = [goldens.golden(VERSION)[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    return [{"prompt_ids": each, "id": f"{n}-{len(each)}"} for n in range(times) for each in ids]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(engine, prompts, out, *more) -> list[str]:
    return ["--engine_dir", str(engine), "--prompt_file", str(prompts), "--output_jsonl", str(out), *LIMITS, *more]


def results(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_goldens(found: list[dict], rows: list[dict]) -> None:
    assert [each["key"] for each in found] == [row["id"] for row in rows]
    for each in found:
        length = int(each["key"].partition("-")[2])
        assert each["ids"] == goldens.golden(VERSION)[f"gen_{length}"].tolist()
        assert (each["finish_reason"], each["prompt_tokens"]) == ("length", length)


def test_more_prompts_than_rows_in_order(engine, tmp_path, capsys):
    rows = golden_rows(3)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    assert run.main(flags(engine, prompts, out, *GREEDY)) == 0
    check_goldens(results(out), rows)
    assert "12 prompts, 288 new tokens in " in capsys.readouterr().err


def test_progress_says_how_fast_and_how_long(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0.0,))
    prompts = write_rows(tmp_path / "p.jsonl", golden_rows(2))
    assert run.main(flags(engine, prompts, tmp_path / "out.jsonl", *GREEDY)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generating: ")]
    assert len(lines) == 7 and all(
        re.fullmatch(r"generating: \d+ %, [\d,]+ tokens/s, \d+ s left", line) for line in lines
    )


def test_a_line_s_own_settings_chat_and_text(engine, tmp_path):
    rows = [
        {"prompt": "Rivers rose", "max_output_len": 3, "top_k": 0, "temperature": 2.0},
        {"prompt": "Rivers rose", "max_output_len": 3, "top_k": 0, "temperature": 2.0},
        {"prompt": "Rivers rose", "max_output_len": 3, "top_k": 0, "temperature": 2.0, "random_seed": 0},
        {"prompt": "Rivers rose", "num_beams": 2, "max_output_len": 5},
        {"messages": [{"role": "user", "content": "你好"}]},
        {"prompt": "你好"},
    ]
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    assert run.main(flags(engine, prompts, out, *GREEDY)) == 0
    found = results(out)
    assert [each["key"] for each in found] == list("123456")
    assert found[0]["ids"] == found[2]["ids"] != found[1]["ids"], "the first line's seed is 0, and they count up"
    assert len(found[3]["ids"]) <= 5 and found[4]["ids"] != found[5]["ids"]
    assert all(isinstance(each["text"], str) for each in found)
    chat_out = tmp_path / "chat.jsonl"
    assert run.main(flags(engine, write_rows(tmp_path / "q.jsonl", rows[4:]), chat_out, *GREEDY, "--chat")) == 0
    assert results(chat_out)[0]["ids"] == results(chat_out)[1]["ids"] == found[4]["ids"], (
        "with --chat a text is a message"
    )


def test_a_file_of_one_run_is_not_overwritten_nor_mixed(engine, tmp_path, capsys):
    rows = golden_rows()
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    assert run.main(flags(engine, prompts, out, *GREEDY)) == 0
    before = out.read_bytes()
    capsys.readouterr()
    scripts.refused(run.main, flags(engine, prompts, out, *GREEDY), "has results already; add --resume", capsys)
    warmer = ["--resume", "--repetition_penalty", "1.2", "--top_k", "1"]
    scripts.refused(run.main, flags(engine, prompts, out, *warmer), "for another prompt, setting or engine", capsys)
    write_rows(prompts, [*rows[1:], {"prompt": "new", "id": "x"}])
    scripts.refused(run.main, flags(engine, prompts, out, *GREEDY, "--resume"), "'0-1' for another", capsys)
    assert out.read_bytes() == before
    write_rows(prompts, rows)
    assert run.main(flags(engine, prompts, out, *GREEDY, "--resume")) == 0 and out.read_bytes() == before


@pytest.mark.parametrize(
    "torn",
    [
        b'{"key": "1-7", "requ',
        b"",
        bytes(4096),
        b'{"key": "1-7", "r' + bytes(99),
        b'{"key": "1-7", "request": "0", "error": "full"}\n',
    ],
)
def test_what_is_missing_is_done_and_what_is_there_is_kept(engine, tmp_path, torn):
    rows = golden_rows()
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    assert run.main(flags(engine, prompts, out, *GREEDY)) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join([lines[6], lines[1], lines[3]]) + torn)
    made = []
    serve = batch.work

    def counted(llm, pull, push):
        serve(llm, pull, lambda results: (made.extend(each.key for each in results), push(results)))

    batch.work = counted
    try:
        assert run.main(flags(engine, prompts, out, *GREEDY, "--resume")) == 0
    finally:
        batch.work = serve
    assert out.read_bytes() == whole
    assert sorted(made) == sorted(row["id"] for row in rows if row["id"] not in ("1-33", "0-7", "0-128"))


@pytest.mark.parametrize("theirs", [b"my notes", b'{"key', b'{"some": "thing"}\n', b"\x93NUMPY\x01\x00", bytes(99)])
def test_somebody_elses_file_is_not_cut(tmp_path, theirs):
    (tmp_path / "notes.txt").write_bytes(theirs)
    try:
        with result_file(tmp_path / "notes.txt", resume=True, keys=()):
            assert START.startswith(theirs)  # what a killed run may leave
    except ConfigError as error:
        assert "line 1 is no result" in str(error)
        assert (tmp_path / "notes.txt").read_bytes() == theirs


def test_a_disk_that_is_full_names_the_file(tmp_path):
    """What could not be written is tried again when the file is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as caught, result_file(tmp_path / "out.jsonl", resume=False, keys=()) as results:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            results.write({"key": "a", "request": "0", "text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "out.jsonl")


def test_results_of_no_prompt_of_this_run_take_no_memory(tmp_path):
    path, line = tmp_path / "out.jsonl", '{{"key": "{}", "request": "0"{}}}\n'
    path.write_text(line.format("a", "") + "".join(line.format(n, ', "error": "full"') for n in range(100)))
    with result_file(path, resume=True, keys={"a", "b"}) as results:
        assert results.done == {"a": "0"} and len(results._places) == 1
        results.write({"key": "b", "request": "1"})
        results.put_in_order(["a", "b"])
    assert path.read_text() == line.format("a", "") + line.format("b", "").replace("0", "1")
    for n in range(2, 5):
        path.write_text(line.format("a", "") + line.format(n, ""))
        with pytest.raises(ConfigError, match=f"'{n}' for another"), result_file(path, resume=True, keys={"a"}):
            pass


def test_a_killed_run_loses_nothing_that_was_finished(engine, tmp_path):
    rows = golden_rows(60)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    command = scripts.script("run.py", flags(engine, prompts, out, *GREEDY))
    process = subprocess.Popen(command, env=scripts.ENVIRONMENT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b"\n") < 8):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = out.read_bytes().count(b"\n")
    assert 8 <= kept < len(rows)
    done = subprocess.run([*command, "--resume"], env=scripts.ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"of {len(rows)} results are in" in done.stderr, done.stderr
    check_goldens(results(out), rows)


def test_a_stopped_run_says_how_to_go_on(engine, tmp_path):
    rows = golden_rows(1000)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    command = scripts.script("run.py", flags(engine, prompts, out, *GREEDY))
    process = subprocess.Popen(command, env=scripts.ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not out.exists() or not out.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and "--resume goes on" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompt_file", "p.txt"], "--prompt_file needs --output_jsonl"),
        (["--output_jsonl", "o.jsonl"], "--output_jsonl belongs to --prompt_file"),
        (["--resume"], "--resume belongs to --prompt_file"),
        (["--prompt_file", "p.txt", "--output_jsonl", "p.txt"], "name two files"),
        (["--prompt_file", "p.txt", "--output_jsonl", "o.jsonl", "--streaming"], "--streaming does not go with"),
        (["--prompt_file", "p.txt", "--output_jsonl", "o.jsonl", "--input_text", "a"], "--input_text does not go with"),
        (["--prompt_file", "p.txt", "--output_jsonl", "."], "is no file"),
        (["--prompt_file", "p.txt", "--output_jsonl", "no/o.jsonl"], "cannot be written"),
        (["--prompt_file", "no.txt", "--output_jsonl", "o.jsonl"], "no.txt is no file"),
        (["--prompt_file", "long.txt", "--output_jsonl", "o.jsonl"], "long.txt line 2: the prompt has"),
        (["--prompt_file", "top.jsonl", "--output_jsonl", "o.jsonl"], "top.jsonl line 1: top_k -1 is out of range"),
        (["--prompt_file", "most.jsonl", "--output_jsonl", "o.jsonl"], "most.jsonl line 1: max_output_len 25 is out"),
        (["--prompt_file", "chat.jsonl", "--output_jsonl", "o.jsonl"], "chat.jsonl line 2: message 1 of the chat is 3"),
        (["--prompt_file", "ids.jsonl", "--output_jsonl", "o.jsonl"], "ids.jsonl line 1: message 0 of the chat is 5"),
        (["--prompt_file", "p.txt", "--output_jsonl", "other.jsonl", "--resume"], "line 1 is no result"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(engine, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch, "work", None)
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "long.txt").write_text("a\n" + "word " * 200)
    write_rows(tmp_path / "top.jsonl", [{"prompt": "a", "top_k": -1}])
    write_rows(tmp_path / "most.jsonl", [{"prompt": "a", "max_output_len": 25}])
    write_rows(tmp_path / "chat.jsonl", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "x"}, 3]}])
    write_rows(tmp_path / "ids.jsonl", [{"messages": [5, 6, 7]}])
    write_rows(tmp_path / "other.jsonl", [{"some": "thing"}])
    scripts.refused(run.main, ["--engine_dir", str(engine), *LIMITS, *more], sentence, capsys)
    assert not os.path.exists("o.jsonl") or not os.path.getsize("o.jsonl")


def test_two_runs_do_not_write_one_file(engine, tmp_path, capsys):
    prompts, out = write_rows(tmp_path / "p.jsonl", golden_rows(1)), tmp_path / "out.jsonl"
    with result_file(out, resume=False, keys=()):
        scripts.refused(run.main, flags(engine, prompts, out), "is written by another run", capsys)


def test_a_request_that_fails_is_a_line_and_is_tried_again(engine, tmp_path, capsys, monkeypatch):
    from baichuan.generation.in_flight import InFlight

    rows = golden_rows(1)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        whole = InFlight._error
        patch.setattr(InFlight, "_error", lambda self, r: "no room; wait" if len(r.prompt) == 7 else whole(self, r))
        assert run.main(flags(engine, prompts, out, *GREEDY)) == 2
    assert [each["key"] for each in results(out) if each.get("error") == "no room; wait"] == ["0-7"]
    assert "1 of them failed" in capsys.readouterr().err
    assert run.main(flags(engine, prompts, out, *GREEDY, "--resume")) == 0
    check_goldens(results(out), rows)
