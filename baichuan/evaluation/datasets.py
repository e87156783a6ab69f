"""Articles and their highlights: from a local file or folder, or the hub's cnn_dailymail.

A row whose article or highlights is empty (or null, or white space) is left out and counted; any other row without
two texts is an error that names the row.  Articles of any length are read: the prompt keeps their end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baichuan.errors import ConfigError, counted
from baichuan.text.hub_dataset import CNN_DAILYMAIL, CONFIGS, hub_rows
from baichuan.text.rows import READERS, Row, file_rows, not_utf8

logger = logging.getLogger(__name__)

HUB_SPLIT = "test"
COLUMNS = ("article", "highlights")
SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".txt")  # a text has no highlights


@dataclass(frozen=True)
class Sample:
    """One article with the summary that a person wrote of it."""

    id: str
    article: str
    highlights: str


@dataclass(frozen=True)
class Dataset:
    """The articles that an evaluation runs over."""

    source: str
    samples: tuple[Sample, ...]
    left_out: int  # rows without an article or without highlights, among those read


def load_samples(path: Path | None, limit: int) -> Dataset:
    """The first `limit` usable rows of `path`, or of cnn_dailymail's test split where path is None.

    path: a .json (an array, or one object per line), .jsonl, .csv or .parquet file, or a folder of them; of a folder
    with files named test*, only those are read.  Columns: article, highlights and, if there is one, id.
    Raises ConfigError where the path holds anything else.
    """
    if path is None:
        source, rows = f"{CNN_DAILYMAIL} {CONFIGS[CNN_DAILYMAIL]}, {HUB_SPLIT}", _hub_rows()
    else:
        source, rows = str(path), _local_rows(path)
    samples, left_out = [], 0
    for number, (place, row) in enumerate(rows):
        sample = _sample(row, number, place)
        if sample:
            samples.append(sample)
        else:
            left_out += 1
        if len(samples) == limit:
            break
    if not samples:
        raise ConfigError(f"{source} holds no row with an article and highlights; give a dataset that does")
    if left_out:
        logger.warning("%s left out of %s for want of an article or highlights", counted(left_out, "row"), source)
    return Dataset(source, tuple(samples), left_out)


def _sample(row: dict, number: int, place: str) -> Sample | None:
    texts = []
    for column in COLUMNS:
        if column not in row:
            raise ConfigError(
                f"{place} has no column {column} but {', '.join(map(str, row)) or 'none'}; "
                f"a dataset needs the columns {' and '.join(COLUMNS)}"
            )
        text = row[column]
        if text is None:
            return None
        if not isinstance(text, str):
            raise ConfigError(f"{place} holds {column} of type {type(text).__name__}; it must be text")
        _check_unicode(text, f"{place}, {column},")
        texts.append(text)
    if not all(text.strip() for text in texts):
        return None
    name = row.get("id")
    return Sample(str(number) if name is None else str(name), *texts)


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise not_utf8(place, f"character {error.start}") from None


def _hub_rows() -> Iterator[Row]:
    logger.info("loading %s from the hub", CNN_DAILYMAIL)
    remedy = f"give a local file with {' and '.join(COLUMNS)} as --dataset_path"
    for number, row in enumerate(hub_rows(CNN_DAILYMAIL, HUB_SPLIT, remedy)):
        yield f"{CNN_DAILYMAIL} row {number}", row


def _local_rows(path: Path) -> Iterator[Row]:
    for file in _files(path):
        yield from file_rows(file, "dataset_path")


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if not path.exists():
        raise ConfigError(f"dataset_path {path} does not exist; give a file ({kinds}) or a folder of them")
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"dataset_path {path} ends in {path.suffix or 'nothing'}; give one of {kinds}")
        return [path]
    files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES and each.is_file())
    if not files:
        raise ConfigError(f"dataset_path {path} holds no {kinds} file; give the file, or the folder that holds it")
    return [file for file in files if file.name.startswith("test")] or files
