"""Parquet files that somebody made to do harm: they unpack to much, lie of their size, or are damaged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from process_memory import growth

from baichuan.api.prompt_file import read_prompt_file
from baichuan.errors import ConfigError
from baichuan.text import parquet
from baichuan.text.rows import file_rows


def bomb(kind: str) -> pyarrow.Table:
    match kind:
        case "one text":
            column = pyarrow.array(["a" * (80 << 20)])
        case "a dictionary's text in every row":
            column = pyarrow.DictionaryArray.from_arrays([0] * 1000, ["a" * (5 << 20)])
        case "nothing in every row":
            column = pyarrow.nulls(5_000_000, pyarrow.string())
        case "one list":
            column = pyarrow.ListArray.from_arrays([0, 20_000_000], np.ones(20_000_000, np.int8))
    return pyarrow.table({"prompt": column})


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("kind", ["one text", "a dictionary's text in every row", "nothing in every row", "one list"])
@pytest.mark.timeout(60)
def test_a_small_parquet_file_that_unpacks_to_much(kind, version, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(bomb(kind), path, compression="zstd", data_page_version=version)
    assert path.stat().st_size < 1 << 20
    for read in (lambda: list(file_rows(path, "dataset_path")), lambda: list(read_prompt_file(path))):
        assert growth(read) < 200 << 20


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_s_size_is_what_the_writer_says(version, dictionary, tmp_path):
    """The file's directory has the sum of a chunk's pages and their headers."""
    texts = [f"{number} 登鹳雀楼 " * (number % 50) for number in range(3000)]
    table = pyarrow.table({"a": texts, "b": [None if number % 3 else number for number in range(3000)]})
    path = tmp_path / "a.parquet"
    how = dict(compression="snappy", use_dictionary=dictionary, data_page_version=version, write_statistics=False)
    pyarrow.parquet.write_table(table, path, row_group_size=1000, data_page_size=4000, write_batch_size=100, **how)
    metadata, pages = pyarrow.parquet.read_metadata(path), 0
    said = [group.column(index) for group in map(metadata.row_group, range(3)) for index in range(2)]
    with open(path, "rb") as file:
        for (_, name, fields), chunk in zip(parquet._chunks(path, file), said, strict=True):
            assert name == chunk.path_in_schema
            found = list(parquet._pages(file, fields))
            headers = chunk.total_uncompressed_size - sum(unpacked for unpacked, _ in found)
            assert 10 * len(found) < headers < 100 * len(found)
            assert sum(values for _, values in found) == chunk.num_values == 1000
            pages += len(found)
    assert pages >= 12
    assert [row["a"] for _, row in file_rows(path, "x")] == texts


def test_a_parquet_column_that_the_library_dies_of(tmp_path):
    """A column that may be empty by its statistics and not by its schema: pyarrow's RowGroupMetaData.column aborts."""
    path, flag, name = tmp_path / "a.parquet", b"\x25\x02", b"\x18\x06prompt"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x", "y"]}), path)
    content = path.read_bytes()
    assert content.count(flag + name) == 1
    path.write_bytes(content.replace(flag + name, b"\x25\x00" + name))
    program = (
        f"from pathlib import Path; from baichuan.text.rows import file_rows; list(file_rows(Path({str(path)!r}), 'x'))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 1 and "ConfigError" in said.stderr.splitlines()[-1], said.stderr


def test_a_parquet_footer_of_many_megabytes(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"]}), path)
    monkeypatch.setattr(parquet, "MAX_FOOTER_BYTES", 100)
    with pytest.raises(ConfigError, match="has a footer of .* more than 100; write larger groups"):
        list(file_rows(path, "x"))


def test_parquet_headers_that_are_damaged(tmp_path):
    """Each byte of a page's header in turn."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", "y"]}), path, use_dictionary=False)
    content, refused = path.read_bytes(), 0
    for place in range(4, 40):
        for value in (0, 0x15, 0x7F, 0xFF):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                list(file_rows(path, "x"))
            except ConfigError:
                refused += 1
    assert refused > 20
