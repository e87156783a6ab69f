"""Texts for calibration, from a local file or from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from baichuan.errors import ConfigError
from baichuan.text.hub_dataset import hub_rows
from baichuan.text.rows import KINDS, READERS, file_rows
from baichuan.text.tokenizer import Tokenizer, check_ids

NUMBER = re.compile(r"\s*[-+]?[\d.]+([eE][-+]?\d+)?\s*")
TEXT_COLUMNS = ("article", "text", "content")  # in order of preference; else the first column of text


def read_texts(dataset: str, count: int, flag: str) -> list[str]:
    """The first `count` texts that are not blank.  flag: what a message calls the data set's command-line flag.

    dataset: a json, jsonl, csv, parquet or txt file (one text a line), or a hub id.  Raises ConfigError.
    """
    path = Path(dataset)
    rows: Iterator[dict]
    if path.suffix in READERS:
        rows = (row for _, row in file_rows(path, flag))
    elif path.exists():
        raise ConfigError(f"{flag} {dataset} is no {KINDS} file; name one of these")
    else:
        rows = hub_rows(dataset, "train", f"give {flag} a local {KINDS} file")
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


def _text_of(row: dict) -> str:
    for column in (*TEXT_COLUMNS, *row):
        if isinstance(row.get(column), str) and not NUMBER.fullmatch(row[column]):  # a CSV's ids are text too
            return row[column]
    raise ConfigError(f"the data set has no column of text, only {', '.join(map(str, row))[:100]}; name another one")
