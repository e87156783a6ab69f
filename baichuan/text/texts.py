"""Texts for calibration, from a local file or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from baichuan.errors import ConfigError
from baichuan.text.hub_dataset import hub_rows, load_dataset, reason
from baichuan.text.tokenizer import Tokenizer, check_ids

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
TEXT_COLUMNS = ("article", "text", "content")  # in order of preference; else the first column of text


def read_texts(dataset: str, count: int, flag: str) -> list[str]:
    """The first `count` texts that are not blank.  flag: what a message calls the data set's command-line flag.

    dataset: a json, jsonl, csv, parquet or txt file (one text a line), or a hub id.  Raises ConfigError.
    """
    path = Path(dataset)
    if path.suffix in BUILDERS:
        rows = _file_rows(path, flag)
    elif path.exists():
        raise ConfigError(f"{flag} {dataset} is no json, jsonl, csv, parquet or txt file; name one of these")
    else:
        rows = hub_rows(dataset, "train", f"give {flag} a local json, jsonl, csv, parquet or txt file")
    texts = list(islice((text for text in map(_text_of, rows) if text.strip()), count))
    if not texts:
        raise ConfigError(f"{flag} {dataset} holds no text; name a data set that does")
    return texts


def encode_texts(texts: list[str], tokenizer: Tokenizer, max_length: int, vocab_size: int) -> list[list[int]]:
    """Each text's first `max_length` tokens.  Raises ConfigError for an id that the model does not have."""
    samples = [tokenizer.encode(text)[:max_length] for text in texts]
    for sample in samples:
        check_ids(sample, vocab_size, "a calibration text")
    return [sample for sample in samples if sample]


def _file_rows(path: Path, flag: str) -> Iterator[dict]:
    if not path.is_file():
        raise ConfigError(f"{flag} {path} does not exist; name a json, jsonl, csv, parquet or txt file")
    try:
        yield from load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    except Exception as error:  # the library raises many types
        raise ConfigError(f"{flag} {path} cannot be read ({reason(error)}); repair it or name another file") from None


def _text_of(row: dict) -> str:
    for column in (*TEXT_COLUMNS, *row):
        if isinstance(row.get(column), str):
            return row[column]
    raise ConfigError(f"the data set has no column of text, only {', '.join(map(str, row))[:100]}; name another one")
