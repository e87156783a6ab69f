"""Files of prompts in every format, and what is wrong in them."""

from __future__ import annotations

import csv
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from baichuan.api.prompt_file import read_prompt_file
from baichuan.errors import ConfigError
from baichuan.text import rows

ROWS = [
    {"prompt": '登鹳雀楼, "two"\nlines', "id": "a", "top_k": 3, "temperature": 0.5},
    {"prompt_ids": [1, 2, 3], "max_output_len": 7},
    {"messages": [{"role": "user", "content": "hi"}], "id": 9, "random_seed": 5},
]


def cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(path, rows=ROWS):
    columns = sorted({name for row in rows for name in row})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows([cell(row[name]) if name in row else "" for name in columns] for row in rows)
    else:
        empty = dict.fromkeys(columns)
        typed = [empty | row | {"id": str(row["id"]) if "id" in row else None} for row in rows]  # a column has one type
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_format_says_the_same(tmp_path, suffix):
    lines = list(read_prompt_file(write(tmp_path / f"prompts.{suffix}")))
    assert [line.prompt for line in lines] == [ROWS[0]["prompt"], [1, 2, 3], ROWS[2]["messages"]]
    assert [line.key for line in lines] == ["a", "2", "9"]
    settings = [{"top_k": 3, "temperature": 0.5}, {"max_output_len": 7}, {"random_seed": 5}]
    assert [dict(line.settings) for line in lines] == settings


def test_text_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeff one \r\n\n二\n".encode())
    lines = list(read_prompt_file(tmp_path / "p.txt"))
    assert [(line.key, line.prompt) for line in lines] == [("1", " one "), ("3", "二")]


BAD = {
    "jsonl": [
        ('{"prompt": "a"}\n{"prompt": "b"', "line 2 is not JSON"),
        ('{"prompt": "a"}\n[1]', "line 2 is a JSON list"),
        ('{"prompt": "a", "temprature": 1}', "line 1 has 'temprature', which is not known"),
        ('{"prompt": 3}', "line 1 has prompt 3, which must be text"),
        ('{"prompt": "a", "prompt_ids": [1]}', "line 1 has prompt and prompt_ids"),
        ('{"id": "a"}', "line 1 has no prompt"),
        ('{"prompt": "a", "top_k": 1.5}', "line 1 has top_k 1.5, which must be an integer"),
        ('{"prompt": "a", "top_k": true}', "line 1 has top_k True, which must be an integer"),
        ('{"prompt_ids": [1, "2"]}', "line 1 has a prompt_id '2'"),
        ('{"prompt": ["a"]}', "line 1 has prompt ['a'], which must be text"),
        ('{"prompt": true}', "line 1 has prompt True, which must be text"),
        ('{"prompt_ids": 5}', "line 1 has prompt_ids 5, which must be a list"),
        ('{"prompt_ids": {"1": 1}}', "line 1 has prompt_ids {'1': 1}, which must be a list"),
        ('{"prompt_ids": [true]}', "line 1 has a prompt_id True, which must be an integer"),
        ('{"prompt_ids": [1.0]}', "line 1 has a prompt_id 1.0, which must be an integer"),
        ('{"prompt_ids": [[1]]}', "line 1 has a prompt_id [1], which must be an integer"),
        ('{"prompt_ids": [null]}', "line 1 has a prompt_id None, which must be an integer"),
        ('{"prompt": "a", "id": [1]}', "line 1 has id [1], which must be text or an integer"),
        ('{"prompt": "a", "id": true}', "line 1 has id True, which must be text or an integer"),
        ('{"prompt": "a", "id": "2"}\n{"prompt": "b"}', "line 2 has the id 2, as"),
        ('{"prompt": "a", "prompt": "b"}', "line 1 is not JSON ('prompt' is there twice)"),
        ('{"prompt": "a", "id": "x\\ud800"}', "line 1 has an id that is not valid UTF-8 at character 1"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("", "holds no prompt"),
        (b'{"prompt": "\xff"}', "line 1 is not valid UTF-8 at byte 12"),
    ],
    "csv": [
        ("prompt,top_k\na,x\n", "row 1, top_k, is not JSON"),
        ("prompt,top_k\na,1\nb\n", "row 2 has 1 cells and the header 2"),
        ("prompt,top_k,prompt\na,1,b\n", "names a column twice"),
        ("text\na\n", "row 1 has 'text', which is not known"),
        ('prompt\n"a\n', "cannot be read"),
        ("prompt\n", "holds no prompt"),
    ],
    "parquet": [("prompt", "cannot be read")],
    "npy": [("", "ends in .npy; give one of .txt, .jsonl, .csv, .parquet")],
}


@pytest.mark.parametrize(("suffix", "content", "sentence"), [(kind, *each) for kind in BAD for each in BAD[kind]])
def test_what_is_wrong_is_one_sentence_with_its_number(tmp_path, suffix, content, sentence):
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        list(read_prompt_file(path))
    assert sentence in str(error.value) and "\n" not in str(error.value)


USER = {"role": "user", "content": "x"}
BAD_MESSAGES = [
    ([], "the chat has no message; give at least one"),
    ([USER, 3], "message 1 of the chat is 3; give an object with a role and a content"),
    ([USER, None], "message 1 of the chat is None; give an object"),
    ([3], "message 0 of the chat is 3; give an object"),
    ([5, 6, 7], "message 0 of the chat is 5; give an object"),
    ([True], "message 0 of the chat is True; give an object"),
    (["hello"], "message 0 of the chat is 'hello'; give an object"),
    ([None], "message 0 of the chat is None; give an object"),
    ([[USER]], "message 0 of the chat is [{'role': 'user', 'content': 'x'}]; give an object"),
    ([USER, {}], "message 1 of the chat has nothing; it needs a role and a content"),
    ([{"role": "user"}], "message 0 of the chat has 'role'; it needs a role and a content"),
    ([USER | {"name": "y"}], "has 'role' and 'content' and 'name'; it needs a role and a content, and takes nothing"),
    ([USER | {"content": ["x"]}], "message 0 of the chat has the content ['x']; give a text"),
    ([USER | {"content": None}], "message 0 of the chat has the content None; give a text"),
    ([USER | {"role": 3}], "role of message 0 3 is not known; use one of system, user, assistant"),
    ([USER | {"role": []}], "role of message 0 [] is not known"),
    ([USER, USER | {"role": "system"}], "message 1 of the chat is the system's; put"),
]


@pytest.mark.parametrize(("messages", "sentence"), BAD_MESSAGES)
def test_messages_that_are_no_chat_are_one_sentence_with_their_line(tmp_path, messages, sentence):
    for suffix, place in (("jsonl", "line 2"), ("csv", "row 2")):
        path = write(tmp_path / f"prompts.{suffix}", [{"messages": [USER]}, {"messages": messages}])
        with pytest.raises(ConfigError) as error:
            list(read_prompt_file(path))
        assert f"{place}: " in str(error.value) and sentence in str(error.value)


def test_messages_of_parquet_s_own_types_are_no_chat(tmp_path):
    path, pairs = tmp_path / "p.parquet", pyarrow.map_(pyarrow.string(), pyarrow.string())
    for column, sentence in (
        (pyarrow.array([[5, 6]]), "message 0 of the chat is 5"),
        (pyarrow.array([["hello"]]), "message 0 of the chat is 'hello'"),
        (pyarrow.array([list(USER.items())], pairs), "message 0 of the chat is ('role', 'user')"),
        (pyarrow.array([[USER, None]]), "message 1 of the chat is None"),
        (pyarrow.array([USER]), "has messages {'role'"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"messages": column}), path)
        with pytest.raises(ConfigError) as error:
            list(read_prompt_file(path))
        assert f"{path} row 1" in str(error.value) and sentence in str(error.value)


def test_lines_are_bounded_and_pipes_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 100)
    for suffix in ("txt", "jsonl", "csv"):
        path = tmp_path / f"long.{suffix}"
        path.write_text("prompt\n" + "a" * 101 + "\n")
        with pytest.raises(ConfigError, match="more than 100 bytes|not JSON"):
            list(read_prompt_file(path))
    (tmp_path / "quoted.csv").write_text("prompt\n" + '"\n",' * 100)  # one row of many lines
    with pytest.raises(ConfigError, match="more than 100 bytes"):
        list(read_prompt_file(tmp_path / "quoted.csv"))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match="is no file"):
        list(read_prompt_file(tmp_path / "pipe.txt"))
