"""Calibration texts from every kind of file, and what is said about a file that holds none."""

import json

import pandas
import pytest

from baichuan.errors import ConfigError
from baichuan.text.hub_dataset import CNN_DAILYMAIL
from baichuan.text.texts import encode_texts, read_texts

ROWS = [{"id": number, "article": f"text {number}", "highlights": "short"} for number in range(4)]


def write(folder, kind):
    path = folder / f"texts.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "csv":
        pandas.DataFrame(ROWS).to_csv(path, index=False)
    elif kind == "parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    else:
        path.write_text("text 0\n\ntext 1\n  \ntext 2\ntext 3\n")
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "txt"])
def test_every_kind_of_file(tmp_path, kind):
    assert read_texts(write(tmp_path, kind), 3, "--calib_dataset") == ["text 0", "text 1", "text 2"]
    assert len(read_texts(write(tmp_path, kind), 512, "--calib_dataset")) == 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.json", None, "does not exist"),
        ("texts.docx", "text", "is no json, jsonl, csv, parquet or txt file"),
        ("broken.json", "{{{", "line 1 is not JSON"),
        ("broken.parquet", "text", "cannot be read"),
        ("numbers.csv", "a,b\n1,2\n", "no column of text, only a, b"),
        ("blank.txt", "\n\n", "holds no text"),
    ],
)
def test_what_is_no_data_set_is_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_texts(str(tmp_path / name), 3, "--calib_dataset")
    assert "\n" not in str(caught.value)


def test_without_a_network_one_sentence_names_the_flag(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="cannot be loaded from the hub .no route to the hub.; give --calib_dataset"):
        read_texts(CNN_DAILYMAIL, 3, "--calib_dataset")


class Letters:
    """A tokenizer of one id a letter."""

    def encode(self, text):
        return list(map(ord, text))


def test_texts_are_cut_and_their_ids_checked():
    assert encode_texts(["abcdef", "", "b"], Letters(), 3, 128) == [[97, 98, 99], [98]]
    with pytest.raises(ConfigError, match="calibration text"):
        encode_texts(["é"], Letters(), 3, 128)
