"""Rows of a parquet file, in memory that is bounded: a small file may unpack to anything.

A page's header says how much it unpacks to, which the library believes and allocates; so all headers are read first.
Where the pages are stands in the file's footer, which is read here too: asked for a damaged chunk of a column, the
library ends the process.
Source: the Apache Parquet format, and Thrift's compact protocol, in which footer and headers are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from baichuan.errors import ConfigError
from baichuan.util.files import open_regular

T = TypeVar("T")

MAX_ROW_BYTES = 4 << 20  # limit of a row: the lengths of its texts and lists together
ROWS_AT_ONCE = 16  # where pages are small; a dictionary's page can stand for one long text in every row
SMALL_PAGES = 16 << 20  # bytes of a page of each column, together
LARGE_PAGES = 128 << 20  # a page of 100 MB is the largest that writers are known to make
MAX_PAGES = 500_000
FREE_BYTES, RATIO = 64 << 20, 50  # a file may unpack to FREE_BYTES + RATIO * its size
ROW_BYTES, VALUE_BYTES = 16, 4  # bytes that a row, and a value of a list, count for in that limit
UNPACKED, PACKED, DATA_PAGE, DATA_PAGE_V2 = 2, 3, 5, 8  # fields of a page's header
HEADER_BYTES = (256, 1 << 16)  # what is read of a page's header, at first and at most
MAX_FOOTER_BYTES = 4 << 20
ROW_GROUPS, COLUMNS, METADATA = 4, 1, 3  # fields of the footer, of a group of rows and of a column's chunk
PATH, PACKED_CHUNK, FIRST_PAGE, DICTIONARY = 3, 7, 9, 11  # fields of that metadata


def parquet_rows(path: Path, columns_of: Callable[[Any], list[str]]) -> Iterator[dict[str, Any]]:
    """columns_of: the columns to read, by the file's pyarrow.Schema.

    Raises ConfigError for a file that unpacks to more than it may, ValueError for a damaged one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_regular(path) as source, pyarrow.parquet.ParquetFile(source) as file:
            columns = columns_of(file.schema_arrow)
            bounds = _bounds(path, source, file.metadata, set(columns))
            number = 0
            for batch in file.iter_batches(bounds.rows_at_once, columns=columns, use_threads=False):
                plain = [each.dictionary_decode() if hasattr(each, "dictionary_decode") else each for each in batch]
                bounds.count(sum(each.nbytes for each in plain) + ROW_BYTES * batch.num_rows)
                for row in pyarrow.RecordBatch.from_arrays(plain, names=batch.schema.names).to_pylist():
                    if (
                        sum(len(value) for value in row.values() if isinstance(value, str | bytes | list))
                        > MAX_ROW_BYTES
                    ):
                        raise ConfigError(
                            f"{path} row {number} has more than {MAX_ROW_BYTES} bytes; give one text per row"
                        )
                    yield row
                    number += 1
    except (pyarrow.ArrowException, OverflowError, RecursionError) as error:  # some of which are no ValueError
        raise ValueError(str(error)) from None


@dataclass
class _Bounds:
    path: Path
    left: int  # bytes that may still be unpacked
    rows_at_once: int = ROWS_AT_ONCE

    def count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ConfigError(f"{self.path} unpacks to more than {RATIO} times its size; write it without compression")


def _bounds(path: Path, source: BinaryIO, metadata: Any, columns: set[str]) -> _Bounds:
    """What may be read of a file whose pages may be read at all."""
    size = path.stat().st_size
    bounds, pages = _Bounds(path, FREE_BYTES + RATIO * size), 0
    widest: dict[int, int] = {}
    bounds.count(ROW_BYTES * metadata.num_rows)
    repeated = {index for index in range(metadata.num_columns) if metadata.schema.column(index).max_repetition_level}
    for index, name, chunk in _chunks(path, source):
        if name.partition(".")[0] not in columns:
            continue
        for unpacked, values in _pages(source, chunk):
            pages += 1
            bounds.count(unpacked + (VALUE_BYTES * values if index in repeated else 0))
            widest[index] = max(widest.get(index, 0), unpacked)
            if pages > MAX_PAGES:
                raise ConfigError(f"{path} has more than {MAX_PAGES} pages; write it with larger ones")
    if sum(widest.values()) > LARGE_PAGES:
        raise ConfigError(f"{path} has pages of more than {LARGE_PAGES} bytes; write it with smaller ones")
    if sum(widest.values()) > SMALL_PAGES:
        bounds.rows_at_once = 1
    bounds.left = FREE_BYTES + RATIO * size  # the rows themselves
    return bounds


def _footer(path: Path, source: BinaryIO) -> dict[int, Any]:
    """The fields of a file's metadata, which lies before its length and the last four bytes."""
    end = source.seek(-8, os.SEEK_END)
    length = int.from_bytes(source.read(4), "little")
    if length > MAX_FOOTER_BYTES:
        raise ConfigError(f"{path} has a footer of {length} bytes, more than {MAX_FOOTER_BYTES}; write larger groups")
    source.seek(max(end - length, 0))
    try:
        return _Compact(source.read(length)).struct()
    except IndexError:
        raise ValueError("the footer is damaged") from None


def _chunks(path: Path, source: BinaryIO) -> Iterator[tuple[int, str, dict[int, Any]]]:
    """Each column's index, path and metadata in each group of rows."""
    for group in _field(_footer(path, source), ROW_GROUPS, list):
        for index, column in enumerate(_field(group, COLUMNS, list)):
            chunk = _field(column, METADATA, dict)
            parts = [part for part in _field(chunk, PATH, list) if isinstance(part, bytes)]
            yield index, b".".join(parts).decode(), chunk


def _field(fields: Any, number: int, kind: type[T]) -> T:
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise ValueError("the footer is damaged")
    return value


def _pages(source: BinaryIO, chunk: Any) -> Iterator[tuple[int, int]]:
    """How much each page of a column's chunk unpacks to, in bytes and in values."""
    place, dictionary = _field(chunk, FIRST_PAGE, int), chunk.get(DICTIONARY)
    if place < 0:
        raise ValueError("the footer is damaged")
    if isinstance(dictionary, int) and 0 < dictionary < place:
        place = dictionary
    end = place + _field(chunk, PACKED_CHUNK, int)
    while place < end:
        header, length = _header(source, place)
        unpacked, packed = header.get(UNPACKED), header.get(PACKED)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or packed < 0:
            raise ValueError("a page's header is damaged")
        described = next((header[each] for each in (DATA_PAGE, DATA_PAGE_V2) if each in header), None)
        yield unpacked, described.get(1, 0) if isinstance(described, dict) else 0
        place += length + packed


def _header(source: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """The fields of a page's header, and its length."""
    for most in HEADER_BYTES:
        source.seek(place)
        header = _Compact(source.read(most))
        try:
            return header.struct(), header.place
        except IndexError:  # it is longer
            continue
    raise ValueError("a page's header has no end")


class _Compact:
    """A value of Thrift's compact protocol.  Raises IndexError where the bytes end, ValueError where they are wrong."""

    def __init__(self, content: bytes):
        self.content, self.place = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 0xF, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > 8:
            raise ValueError("a footer or a page's header is nested too deep")
        match kind:
            case 1 | 2:
                return kind == 1
            case 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                return self._list(depth)
            case 12:
                return self.struct(depth + 1)
        raise ValueError("a footer or a page's header is damaged")  # or has a map, which none has

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if size > len(self.content) - self.place:  # each takes at least a byte
            raise IndexError
        kind = head & 0xF
        return [self._byte() if kind in (1, 2) else self._value(kind, depth + 1) for _ in range(size)]

    def _byte(self) -> int:
        self.place += 1
        return self.content[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (octet := self._byte()) & 0x80 and shift < 63:
            value |= (octet & 0x7F) << shift
            shift += 7
        return value | octet << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _bytes(self, size: int) -> bytes:
        self.place += size
        if self.place > len(self.content):
            raise IndexError
        return self.content[self.place - size : self.place]
