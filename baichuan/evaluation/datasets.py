"""Articles and their highlights: from a local file or folder, or the hub's cnn_dailymail.

A row whose article or highlights is empty (or null, or white space) is left out and counted; any other row without
two texts is an error that names the row.  Articles of any length are read: the prompt keeps their end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baichuan.errors import ConfigError
from baichuan.text.hub_dataset import CNN_DAILYMAIL, CONFIGS, hub_rows, reason

logger = logging.getLogger(__name__)

HUB_SPLIT = "test"
COLUMNS = ("article", "highlights")
ROWS_AT_ONCE = 256
MAX_LINE_BYTES = 64 << 20
MAX_ARRAY_BYTES = 1 << 30  # a JSON array is read whole; JSON lines, CSV and parquet are not


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
        logger.warning("%d row(s) of %s have no article or no highlights and are left out", left_out, source)
    return Dataset(source, tuple(samples), left_out)


Row = tuple[str, dict]  # (its place, for messages; its columns)


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
        raise _not_utf8(place, f"character {error.start}") from None


def _not_utf8(place: str, where: str) -> ConfigError:
    return ConfigError(f"{place} is not valid UTF-8 at {where}; convert the dataset to UTF-8")


def _hub_rows() -> Iterator[Row]:
    logger.info("loading %s from the hub", CNN_DAILYMAIL)
    remedy = f"give a local file with {' and '.join(COLUMNS)} as --dataset_path"
    for number, row in enumerate(hub_rows(CNN_DAILYMAIL, HUB_SPLIT, remedy)):
        yield f"{CNN_DAILYMAIL} row {number}", row


def _local_rows(path: Path) -> Iterator[Row]:
    try:
        for file in _files(path):
            yield from READERS[file.suffix](file)
    except OSError as error:
        what = error.strerror or reason(error)
        raise ConfigError(f"dataset_path {path} cannot be read ({what}); check the path") from None
    except UnicodeDecodeError as error:  # from a parser that reads the file itself
        raise _not_utf8(str(path), f"a byte 0x{error.object[error.start]:02x}") from None
    except ValueError as error:  # what pandas and pyarrow raise for files that are damaged
        raise ConfigError(f"dataset_path {path} cannot be read ({reason(error)}); repair the file") from None


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(READERS)
    if not path.exists():
        raise ConfigError(f"dataset_path {path} does not exist; give a file ({kinds}) or a folder of them")
    if not path.is_dir():
        if path.suffix not in READERS:
            raise ConfigError(f"dataset_path {path} ends in {path.suffix or 'nothing'}; give one of {kinds}")
        return [path]
    files = sorted(each for each in path.iterdir() if each.suffix in READERS and each.is_file())
    if not files:
        raise ConfigError(f"dataset_path {path} holds no {kinds} file; give the file, or the folder that holds it")
    return [file for file in files if file.name.startswith("test")] or files


def _read_json(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        yield from _json_array(path, file) if start.startswith(b"[") else _json_lines(path, file)


def _json_array(path: Path, file) -> Iterator[Row]:
    content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        raise ConfigError(f"{path} is a JSON array of more than {MAX_ARRAY_BYTES} bytes; write one object per line")
    for number, row in enumerate(_parse(content, str(path))):
        yield _json_row(row, f"{path} row {number}")


def _json_lines(path: Path, file) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        place = f"{path} line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{place} has more than {MAX_LINE_BYTES} bytes; give one article per line")
        if line.strip():
            yield _json_row(_parse(line, place), place)


def _parse(content: bytes, place: str):
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(place, f"byte {error.start} (0x{content[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); give an array of objects, or one object per line") from None


def _json_row(row, place: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is a JSON {type(row).__name__}; each row is an object with {' and '.join(COLUMNS)}")
    return place, row


def _read_csv(path: Path) -> Iterator[Row]:
    import pandas

    # Every cell is text: an article "NA" or an id "007" stays what it is.
    chunks = pandas.read_csv(path, dtype=str, na_filter=False, encoding="utf-8-sig", chunksize=ROWS_AT_ONCE)
    with chunks:
        rows = (row for chunk in chunks for row in chunk.to_dict("records"))
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        present = file.schema_arrow.names
        wanted = [name for name in (*COLUMNS, "id") if name in present]
        columns = wanted if set(COLUMNS) <= set(wanted) else present  # the message names what is there
        rows = (row for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns) for row in batch.to_pylist())
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))


READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
