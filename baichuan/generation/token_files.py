"""Prompts and results as token ids in CSV and NumPy files."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from baichuan.errors import ConfigError
from baichuan.util.files import atomic_path, open_regular
from baichuan.util.npy import read_array, write_array

MAX_IDS = 1 << 23  # most ids of a file; Python takes 40 bytes for each
MAX_LINES = 1 << 20
MAX_LINE_BYTES = 8 << 20  # longest line of a CSV file: a prompt of a million ids


def read_prompts(path: Path, pad_id: int) -> list[list[int]]:
    """One prompt per row.  CSV: rows of any length.  npy: integers [prompts, length], short rows padded with pad_id.

    Raises ConfigError for a file that is neither.
    """
    try:
        with open_regular(path) as file:
            if path.suffix == ".csv":
                prompts = list(_csv_rows(file))
            elif path.suffix == ".npy":
                prompts = [_unpadded(row, pad_id) for row in np.atleast_2d(_integers(file))]
            else:
                raise ConfigError(f"input_tokens {path} ends in {path.suffix or 'nothing'}; give a .csv or a .npy file")
    except OSError as error:
        raise ConfigError(
            f"input_tokens {path} cannot be read ({error.strerror}); give a .csv or a .npy file"
        ) from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"input_tokens {path} does not hold token ids ({error}); give integers only") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ConfigError(f"input_tokens {path} holds no prompt; give one row of ids per prompt")
    return prompts


def require_writable(name: str, path: Path) -> None:
    """Raise ConfigError unless a file can be created at `path`; name: the command-line flag that gave the path."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ConfigError(f"{name} {path} is {kind}, which no file can replace; name a file")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be written ({error.strerror}); choose another folder") from None


def write_csv(path: Path, rows: Sequence[Sequence[int]]) -> None:
    """One sequence per row."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_npy(path: Path, rows: Sequence[Sequence[int]], pad_id: int) -> None:
    """int32 [sequences, longest], short rows padded with pad_id."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    _save(path, padded)


def write_logits(path: Path, logits: Sequence[Tensor | None]) -> None:
    """float32 [sequences, steps, vocab_size]; NaN after a sequence's last step.  logits: each [steps, vocab_size]"""
    kept = [each for each in logits if each is not None]
    _save(path, torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=float("nan")).numpy())


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write_array(file.write, array)


def _csv_rows(file: BinaryIO) -> Iterator[list[int]]:
    """Each line's ids; bounded in length, so that no file takes more memory than its ids."""
    count, lines = 0, iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    reader = csv.reader(_text(line) for line in lines)
    for row in reader:
        ids = [int(cell) for cell in row if cell.strip()]
        count += len(ids)
        if count > MAX_IDS or reader.line_num > MAX_LINES:
            raise ValueError(f"it has more than {MAX_IDS} of them, or more than {MAX_LINES} lines")
        yield ids


def _text(line: bytes) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line has more than {MAX_LINE_BYTES} bytes")
    return line.decode("utf-8-sig")


def _integers(file: BinaryIO) -> np.ndarray:
    array = read_array(file, MAX_IDS)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(f"it has type {array.dtype} and {array.ndim} dimensions")
    return array


def _unpadded(row: np.ndarray, pad_id: int) -> list[int]:
    ids = row.tolist()
    while ids and ids[-1] == pad_id:
        ids.pop()
    return ids
