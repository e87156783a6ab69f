"""Damage to parquet files that keeps their format: a table's columns, values, and how it is written."""

from __future__ import annotations

import io
from random import Random
from typing import Any

from tests.fuzz import mutate_bytes as damage

KINDS = ("int64", "float64", "binary", "large_string", "bool_", "null", "date64", "string_view")
VALUES: list[Any] = [None, "", " ", 0, -1, 1 << 40, 1.5, float("nan"), True, b"\xff", [], [1], ["a"], {"role": "user"}]
VALUES += [
    "a" * (5 << 20),
    [[]],
    [None],
    [{"role": "user", "content": "hi"}],
    [{"role": 3}],
    "\0",
    "\x1b[31m",
    "\u202e",
]
CODECS = ("zstd", "none", "gzip", "brotli", "snappy")


def parquet(chance: Random, content: bytes) -> bytes:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content), use_threads=False)
        table = _changed(chance, table)
        out = io.BytesIO()
        how = dict(compression=chance.choice(CODECS), data_page_version=chance.choice(("1.0", "2.0")))
        size = chance.choice((1, 100, 1 << 20))
        pyarrow.parquet.write_table(table, out, data_page_size=size, use_dictionary=bool(chance.randrange(2)), **how)
        return out.getvalue()
    except (pyarrow.ArrowException, ValueError, TypeError, OSError, KeyError, OverflowError):  # no such table
        return damage.flip_bits(chance, content)


def _changed(chance: Random, table: Any) -> Any:
    import pyarrow

    names, place = table.column_names, chance.randrange(table.num_columns)
    match chance.randrange(9):
        case 0:
            return table.remove_column(place)
        case 1:
            text = chance.choice(damage.TEXTS).encode("utf-8", "replace").decode()[:1000]
            return table.rename_columns([text if each == names[place] else each for each in names])
        case 2:
            return table.append_column(chance.choice(names), table.column(chance.randrange(table.num_columns)))
        case 3:
            kind = getattr(pyarrow, chance.choice(KINDS))()
            return table.set_column(place, names[place], table.column(place).cast(kind))
        case 4:
            return table.set_column(place, names[place], table.column(place).dictionary_encode())
        case 5:
            return table.slice(0, chance.choice((0, 1)))
        case 6:
            return pyarrow.concat_tables([table] * chance.choice((2, 50, 2000)))
        case _:
            value = chance.choice(VALUES)
            values = [value] * table.num_rows if chance.randrange(2) else table.column(place).to_pylist()
            if values:
                values[chance.randrange(len(values))] = value
            return table.set_column(place, names[place], pyarrow.array(values))
