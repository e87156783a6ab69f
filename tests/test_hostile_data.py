"""Data that somebody made to do harm: arrays, data sets and scales that lie of their size, or have no end."""

from __future__ import annotations

import errno
import json
import os
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from process_memory import growth

from baichuan.errors import BaichuanError, CheckpointError, ConfigError
from baichuan.generation.token_files import read_prompts, write_logits
from baichuan.text import rows
from baichuan.text.printable import sentence
from baichuan.text.rows import READERS, file_rows
from baichuan.weights.binary.fp8_scales import read_fp8_scales
from baichuan.weights.hub.config_json import MAX_CONFIG_BYTES, read_json_object
from baichuan.weights.hub.safetensors_reader import open_safetensors
from baichuan.weights.tensor_file import read_tensors

pipe_or_device = pytest.mark.parametrize("kind", ["pipe", "device"])


def endless(path: Path, kind: str) -> Path:
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    return path


@pipe_or_device
@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_in_place_of_a_data_set(suffix, kind, tmp_path):
    with pytest.raises(ConfigError, match="not a regular file"):
        list(file_rows(endless(tmp_path / f"a{suffix}", kind), "dataset_path"))


@pipe_or_device
@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_in_place_of_scales_and_shards(kind, tmp_path):
    path = endless(tmp_path / "x", kind)
    for read in (lambda: read_fp8_scales(path, 1), lambda: open_safetensors(path), lambda: read_tensors(path)):
        with pytest.raises(BaichuanError, match="not a regular file"):
            read()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[" + b"[]," * (4 << 20)),
        ("a.json", b'[{"article": [' + b"[]," * (4 << 20)),
        ("a.jsonl", b"[" + b"[]," * (4 << 20)),
        ("a.csv", b"1," * (10 << 20)),
        ("a.csv", b"article\n" + b"1," * (10 << 20)),
        ("a.txt", b"x" * (20 << 20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_data_set_of_one_endless_row(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert growth(lambda: list(file_rows(tmp_path / name, "dataset_path"))) < 600 << 20


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.csv", "a.jsonl"])
def test_a_data_set_of_blank_lines(name, tmp_path):
    """A second for each million of them, and several files of any length."""
    (tmp_path / name).write_bytes(b"[" * (name == "a.json") + b"\n" * (8 << 20))
    with pytest.raises(ConfigError, match="blank lines; take them out|no line names its columns|is not JSON"):
        list(file_rows(tmp_path / name, "dataset_path"))
    (tmp_path / name).write_bytes(b"\n" * 1000 + b'{"article": "a"}\n')
    assert name == "a.csv" or len(list(file_rows(tmp_path / name, "dataset_path"))) == 1


def test_an_array_of_many_small_rows_is_not_copied_with_each_of_them(tmp_path, monkeypatch):
    copied = 0

    class Counting(str):
        """Text that counts the characters of it that are copied."""

        def __getitem__(self, key):
            nonlocal copied
            found = super().__getitem__(key)
            copied += len(found)
            return Counting(found)

        def __add__(self, other):
            return Counting(super().__add__(other))

    class Text(rows._Text):
        def _more(self, count=0):
            self.piece = Counting(self.piece)
            return super()._more(count)

    monkeypatch.setattr(rows, "_Text", Text)
    content = f"[{','.join(['{}'] * 150_000)}]"
    (tmp_path / "a.json").write_text(content)
    assert len(list(file_rows(tmp_path / "a.json", "dataset_path"))) == 150_000
    assert 0 < copied < 4 * len(content)


@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_rows_of_an_array_wherever_a_piece_of_the_file_ends(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "READ_CHARACTERS", piece)
    values = [{"a": "é" * n, "n": [n, -1.5e3]} for n in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=3, ensure_ascii=False) + "\n \n")
    assert [row for _, row in file_rows(tmp_path / "a.json", "dataset_path")] == values


@pytest.mark.timeout(20)  # every name compared with every other one took twice as long
def test_a_hundred_thousand_keys_of_which_one_is_there_twice(tmp_path):
    names = "".join(f'"{n:x}":1,' for n in range(100_000))
    (tmp_path / "config.json").write_text(f'{{{names}"last":1,"last":2}}')
    with pytest.raises(CheckpointError, match="'last' is there twice"):
        read_json_object(tmp_path / "config.json", MAX_CONFIG_BYTES)


@pytest.mark.parametrize("content", [b"1," * (10 << 20), b"12\n" * (2 << 20), b"\n" * (2 << 20)])
def test_a_csv_of_too_many_ids(content, tmp_path):
    (tmp_path / "p.csv").write_bytes(content)
    assert growth(lambda: read_prompts(tmp_path / "p.csv", 0)) < 1 << 30


def test_a_sparse_npy(tmp_path):
    with open(tmp_path / "p.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (1, 64 << 20)})
        file.truncate(file.tell() + (256 << 20))
    assert growth(lambda: read_prompts(tmp_path / "p.npy", 0)) < 100 << 20


@pytest.mark.parametrize("read", [open_safetensors, read_tensors])
def test_an_endless_safetensors_header(read, tmp_path):
    names = ",".join(f'"{n}":{{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}' for n in range(200_000))
    header = f"{{{names}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert growth(lambda: read(tmp_path / "x.safetensors")) < 100 << 20


# Arrays


def npy(header: str, data: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    encoded = header.encode() + b"\n"
    size = (len(encoded) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + encoded + data


GOOD = "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }"
DATA = b"\5\0\0\0\6\0\0\0"
SHAPES = [
    "(9223372036854775808,)",
    "(18446744073709551616, 0)",
    "(True, 2)",
    "(-1,)",
    "(2.0,)",
    "(2, 2)",
    "(1,)",
    "(3,)",
]
HEADERS = ["{", "", "None", "(((((", "  {'descr':\n 'x'", "{'descr': '<i4'}", '"""', GOOD.replace("<i4", "|O")]
HEADERS += [GOOD.replace("(2,)", shape) for shape in SHAPES] + [GOOD.replace("False", "1"), GOOD.replace("<i4", "<i99")]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_npy_as_numpy_reads_them(version, tmp_path):
    (tmp_path / "p.npy").write_bytes(npy(GOOD, DATA, version))
    assert read_prompts(tmp_path / "p.npy", 0) == [[5, 6]] == np.atleast_2d(np.load(tmp_path / "p.npy")).tolist()


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.ones((3, 1), ">i8"), np.ones(4, np.uint8)])
def test_arrays_as_numpy_writes_them(array, tmp_path):
    for written in (array, np.asfortranarray(array)):
        np.save(tmp_path / "p.npy", written)
        assert read_prompts(tmp_path / "p.npy", -1) == np.atleast_2d(array).tolist()


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_npy_that_is_wrong(header, tmp_path):
    (tmp_path / "p.npy").write_bytes(npy(header, DATA))
    with pytest.raises(ConfigError, match="does not hold token ids"):
        read_prompts(tmp_path / "p.npy", 0)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY", npy(GOOD, DATA, 4), npy(GOOD, DATA, 1, 60000)])
def test_what_is_no_npy(content, tmp_path):
    (tmp_path / "p.npy").write_bytes(content)
    with pytest.raises(ConfigError, match="does not hold token ids"):
        read_prompts(tmp_path / "p.npy", 0)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_scales_compressed_as_numpy_does_not(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("_np:layers:0:attention:qkv:q:activation_scaling_factor.npy", npy(GOOD, DATA))
    with pytest.raises(CheckpointError, match="encrypted or compressed otherwise"):
        read_fp8_scales(tmp_path / "x.npz", 1)


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99), (10, 8), (20, 200), (24, 200)])
def test_scales_whose_directory_is_edited(offset, value, tmp_path):
    """Encrypted, an unknown method, stored data said to be deflated, other sizes."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("_np:layers:0:attention:qkv:q:activation_scaling_factor.npy", npy(GOOD, DATA))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[content.index(b"PK\1\2") + offset] = value
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.npz"):
        read_fp8_scales(tmp_path / "x.npz", 1)


def test_a_disk_that_is_full_while_logits_are_written_says_why(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_logits(tmp_path / "x.npy", [torch.zeros(1, 5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename and not list(tmp_path.iterdir())


def test_a_sentence_is_one_line_and_bounded():
    assert sentence("a\u2028b\nc") == "a\\u2028b\\nc"
    assert len(sentence("x" * 100_000)) < 3000 and sentence("x" * 100) == "x" * 100
