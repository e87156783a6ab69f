"""Rows of a local data set one after another: JSON, JSON lines, CSV, parquet or text, in memory that a row bounds."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from baichuan.errors import ConfigError
from baichuan.text.parquet import MAX_ROW_BYTES, parquet_rows
from baichuan.util.files import open_regular

READ_CHARACTERS = 1 << 16
MAX_BLANK_LINES = 1 << 20  # one after another: nobody means them, and they take time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
VISIBLE = re.compile(r"[^ \t\r\n]")  # what is no white space of JSON's
DECODER = json.JSONDecoder()

Row = tuple[str, dict]  # (its place, for messages; its columns)


def file_rows(path: Path, flag: str) -> Iterator[Row]:
    """The rows of a file whose name ends in one of READERS.

    flag: what messages call the file.  Raises ConfigError where the file cannot be read or holds no rows.
    """
    if not path.exists():
        raise ConfigError(f"{flag} {path} does not exist; name a {KINDS} file")
    try:
        yield from READERS[path.suffix](path)
    except OSError as error:
        what = error.strerror or reason(error)
        raise ConfigError(f"{flag} {path} cannot be read ({what}); check the path") from None
    except UnicodeDecodeError as error:  # from a parser that reads the file itself
        raise not_utf8(str(path), f"a byte 0x{error.object[error.start]:02x}") from None
    except (ValueError, KeyError, csv.Error) as error:  # what pyarrow raises for damage, and csv
        raise ConfigError(f"{flag} {path} cannot be read ({reason(error)}); repair the file") from None


def reason(error: Exception) -> str:
    """The error's message on one line, without its final full stop."""
    return (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")


def not_utf8(place: str, where: str) -> ConfigError:
    return ConfigError(f"{place} is not valid UTF-8 at {where}; convert the file to UTF-8")


def _read_json(path: Path) -> Iterator[Row]:
    with open_regular(path) as file:
        start = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
        file.seek(0)
        yield from _json_array(path, file) if start.startswith(b"[") else _json_lines(path, file)


def _json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    """The array's elements, each as soon as it is read."""
    text, number = _Text(io.TextIOWrapper(file, "utf-8-sig")), 0
    text.take()
    while text.next() != "]" or number:
        place = f"{path} row {number}"
        yield _object(text.value(place), place)
        number += 1
        if text.next() not in (",", "]"):
            raise ConfigError(f"{path} is not JSON (no comma or ] after row {number - 1}); repair the file")
        if text.take() == "]":
            break
    else:
        text.take()
    if text.next():
        raise ConfigError(f"{path} is not JSON (text after the array); repair the file")


class _Text:
    """A file's text, of which a piece is in memory; what lies before `place` in it has been read."""

    def __init__(self, file: TextIO):
        self.file, self.piece, self.place = file, "", 0

    def next(self) -> str:
        """The next character that is not white space, which stays; "" at the end."""
        while True:
            found = VISIBLE.search(self.piece, self.place)
            self.place = found.start() if found else len(self.piece)
            if self.place < len(self.piece):
                return self.piece[self.place]
            if not self._more():
                return ""

    def take(self) -> str:
        character = self.next()
        self.place += 1
        return character

    def value(self, place: str) -> Any:
        """The JSON value that begins here."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.piece, self.place)
                if end < len(self.piece) or not self._more():  # a number may go on
                    self.place = end
                    return value
            except (ValueError, RecursionError) as error:
                left = len(self.piece) - self.place
                if left > MAX_ROW_BYTES:
                    raise _too_long(place) from None
                if isinstance(error, RecursionError) or not self._more(3 * left):
                    raise ConfigError(f"{place} is not JSON ({error}); repair the file") from None

    def _more(self, count: int = 0) -> bool:
        """Read count characters more, or a few; False at the end."""
        found = self.file.read(max(count, READ_CHARACTERS))
        self.piece, self.place = self.piece[self.place :] + found, 0
        return bool(found)


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    for place, line in lines(path, file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"{place} is not JSON ({error}); give an array of objects, or one object per line"
            raise ConfigError(message) from None
        yield _object(row, place)


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is a JSON {type(row).__name__}; each row is an object of columns")
    return place, row


def lines(path: Path, file: BinaryIO, blank: bool = False) -> Iterator[tuple[str, str]]:
    """(place, text) of each line, its end included; blank: blank ones too."""
    name, blanks = str(path), 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
        blanks = blanks + 1 if line.isspace() else 0
        place = f"{name} line {number}"
        if blanks > MAX_BLANK_LINES:
            raise ConfigError(f"{place} ends {blanks} blank lines; take them out")
        if len(line) > MAX_ROW_BYTES:
            raise _too_long(place)
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(place, f"byte {error.start} (0x{line[error.start]:02x})") from None
        if blank or text.strip():
            yield place, text


def _read_csv(path: Path) -> Iterator[Row]:
    """Every cell is text: an article "NA" or an id "007" stays what it is."""
    with open_regular(path) as file:
        rows = csv_rows(path, file)
        _, header = next(rows, ("", []))
        if not header:
            raise ConfigError(f"{path} cannot be read (no line names its columns); repair the file")
        number = 0
        for place, cells in rows:
            if len(cells) > len(header):
                message = f"{place} has {len(cells)} cells and there are {len(header)} columns"
                raise ConfigError(f"{path} cannot be read ({message}); repair the file")
            if cells:
                yield f"{path} row {number}", dict(zip(header, cells, strict=False))
                number += 1


def csv_rows(path: Path, file: BinaryIO, strict: bool = False) -> Iterator[tuple[str, list[str]]]:
    """("line N", cells) of each row, the header's first.  strict: the csv module's; it raises csv.Error."""
    csv.field_size_limit(MAX_ROW_BYTES)
    size = 0  # characters of the row that is being read, whose cells may hold many lines

    def counted() -> Iterator[str]:
        nonlocal size
        for place, text in lines(path, file, blank=True):
            if (size := size + len(text)) > MAX_ROW_BYTES:
                raise _too_long(place)
            yield text

    reader = csv.reader(counted(), strict=strict)
    for cells in reader:
        yield f"line {reader.line_num}", cells
        size = 0


def _read_parquet(path: Path) -> Iterator[Row]:
    yield from ((f"{path} row {number}", row) for number, row in enumerate(parquet_rows(path, _columns)))


def _columns(schema: Any) -> list[str]:
    """The columns of text; all, for messages, where none is."""
    import pyarrow

    kinds = ("string", "large_string", "string_view", "dictionary", "integer", "null")  # integers: ids
    text = [getattr(pyarrow.types, f"is_{kind}") for kind in kinds]
    return [field.name for field in schema if any(holds(field.type) for holds in text)] or schema.names


def _read_text(path: Path) -> Iterator[Row]:
    with open_regular(path) as file:
        yield from ((place, {"text": line.rstrip("\r\n")}) for place, line in lines(path, file))


def _too_long(place: str) -> ConfigError:
    return ConfigError(f"{place} has more than {MAX_ROW_BYTES} bytes; give one text per row")


READERS = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_text}
KINDS = "json, jsonl, csv, parquet or txt"
