"""Reading articles: every format gives the same samples; what is not a dataset gives one sentence."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from baichuan.errors import ConfigError
from baichuan.evaluation.datasets import Sample, load_samples
from baichuan.text import rows

ROWS = [
    {"id": "a1", "article": 'One, two.\nThree "four".', "highlights": "One.\nTwo."},
    {"id": "007", "article": "喜马拉雅山很高。", "highlights": "山高。"},
    {"id": "x", "article": "NA", "highlights": "null"},
]
SAMPLES = tuple(Sample(**row) for row in ROWS)


def write_json(path: Path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_jsonl(path: Path, rows):
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def write_csv(path: Path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {".json": write_json, ".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}


def write(path: Path, rows=ROWS) -> Path:
    WRITERS[path.suffix](path, rows)
    return path


@pytest.fixture(params=WRITERS)
def file(request, tmp_path):
    return tmp_path / f"articles{request.param}"


def test_every_format_gives_the_same_samples(file):
    assert load_samples(write(file), 100).samples == SAMPLES
    assert load_samples(file, 2).samples == SAMPLES[:2]
    assert load_samples(file.parent, 100).samples == SAMPLES


def test_json_lines_in_a_file_named_json(tmp_path):
    write_jsonl(tmp_path / "articles.json", ROWS)
    assert load_samples(tmp_path / "articles.json", 100).samples == SAMPLES


def test_rows_are_numbered_where_there_is_no_id(file):
    write(file, [{key: row[key] for key in ("article", "highlights")} for row in ROWS])
    assert [sample.id for sample in load_samples(file, 100).samples] == ["0", "1", "2"]


def test_a_folder_is_read_in_the_order_of_names_and_only_its_test_split(tmp_path):
    for name, row in zip(("b.csv", "a.jsonl", "c.parquet"), ROWS, strict=True):
        write(tmp_path / name, [row])
    (tmp_path / "README.md").write_text("not data")
    assert [sample.id for sample in load_samples(tmp_path, 100).samples] == ["007", "a1", "x"]
    write(tmp_path / "test-00000-of-00001.parquet", ROWS[:1])
    assert load_samples(tmp_path, 100).samples == SAMPLES[:1]


def test_rows_without_text_are_left_out_counted_and_not_part_of_the_limit(file, caplog):
    caplog.set_level(logging.WARNING, logger="baichuan")
    empty = [{"id": "e", "article": "", "highlights": "x"}, {"id": "f", "article": "x", "highlights": " \n"}]
    dataset = load_samples(write(file, [*empty, *ROWS]), 2)
    assert dataset.samples == SAMPLES[:2] and dataset.left_out == 2
    assert "2 rows left out" in caplog.text
    assert load_samples(write(file), 2).left_out == 0


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_null_is_empty(suffix, tmp_path):
    file = write(tmp_path / f"articles{suffix}", [{"id": "n", "article": None, "highlights": "x"}, *ROWS])
    assert load_samples(file, 100).left_out == 1


def test_an_article_longer_than_a_parsers_field_is_read_whole(file):
    article = "word " * 60_000  # 300 kB: over csv.field_size_limit
    rows = [{"id": "long", "article": article, "highlights": "words"}]
    assert load_samples(write(file, rows), 1).samples[0].article == article


@pytest.mark.parametrize("missing", ["article", "highlights"])
def test_a_missing_column_is_named_with_those_that_are_there(file, missing):
    write(file, [{"text" if key == missing else key: value for key, value in row.items()} for row in ROWS])
    with pytest.raises(ConfigError, match=rf"no column {missing} but .*text.*; a dataset needs"):
        load_samples(file, 100)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_bytes_that_are_not_utf8(suffix, tmp_path):
    file = write(tmp_path / f"articles{suffix}", [{"id": "1", "article": "MARK", "highlights": "x"}])
    assert load_samples(file, 1).samples[0].article == "MARK"
    file.write_bytes(file.read_bytes().replace(b"MARK", b"caf\xe9 au lait"))
    with pytest.raises(ConfigError, match="not valid UTF-8 at .*0xe9.*; convert"):
        load_samples(file, 1)


def test_parquet_text_that_is_not_utf8(tmp_path):
    text = pa.array([b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    raw = pa.StringArray.from_buffers(1, *text.buffers()[1:])
    table = pa.table({"article": raw, "highlights": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="not valid UTF-8 at .*; convert"):
        load_samples(tmp_path / "a.parquet", 1)


def test_half_a_surrogate_pair_is_not_utf8(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"article": "x\\ud83d", "highlights": "y"}')
    with pytest.raises(ConfigError, match="line 1, article, is not valid UTF-8 at character 1"):
        load_samples(file, 1)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"article": "x", "highlights": "y"}\n{"article": ', "line 2 is not JSON"),
        ("a.json", b"[1, 2]", "row 0 is a JSON int"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b'{"article": 5, "highlights": "y"}', "line 1 holds article of type int"),
        ("a.jsonl", b"", "holds no row"),
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"article,highlights\n", "holds no row"),
        ("a.csv", b"article,highlights\nx,y\nx,y,z,w\n", "cannot be read .*line 3"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.txt", b"x", "ends in .txt"),
    ],
)
def test_what_is_not_a_dataset_gives_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_samples(tmp_path / name, 100)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_no_such_path_and_no_data_in_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_samples(tmp_path / "none.json", 1)
    with pytest.raises(ConfigError, match="holds no .json, .jsonl, .csv, .parquet file"):
        load_samples(tmp_path, 1)


def test_limits_on_what_is_read_at_once(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", ROWS)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 20)
    monkeypatch.setattr(rows, "READ_CHARACTERS", 8)
    with pytest.raises(ConfigError, match="row 0 has more than 20 bytes"):
        load_samples(tmp_path / "a.json", 1)
    with pytest.raises(ConfigError, match="line 1 has more than 20 bytes"):
        load_samples(tmp_path / "a.jsonl", 1)


def test_the_hub_is_asked_for_cnn_dailymail(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{key: row[key] for key in ("article", "highlights", "id")} for row in ROWS]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_samples(None, 2).samples == SAMPLES[:2]
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "test", "streaming": False})]


def test_without_the_hub_the_sentence_names_dataset_path(tmp_path):
    """A real offline load, in a process of its own because huggingface_hub reads its settings when imported."""
    code = "from baichuan.evaluation.datasets import load_samples\nload_samples(None, 1)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: abisee/cnn_dailymail cannot be loaded from the hub" in last and "--dataset_path" in last
