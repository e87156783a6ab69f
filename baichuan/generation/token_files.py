"""Prompts and results as token ids in CSV and NumPy files."""

from __future__ import annotations

import csv
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baichuan.errors import ConfigError
from baichuan.util.files import atomic_path

MAX_BYTES = 1 << 30


def read_prompts(path: Path, pad_id: int) -> list[list[int]]:
    """One prompt per row.  CSV: rows of any length.  npy: integers [prompts, length], short rows padded with pad_id.

    Raises ConfigError for a file that is neither.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"input_tokens {path} is not a regular file; give a .csv or a .npy file")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"input_tokens {path} is larger than {MAX_BYTES} bytes; split it")
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                prompts = [[int(cell) for cell in row if cell.strip()] for row in csv.reader(file)]
        elif path.suffix == ".npy":
            prompts = [_unpadded(row, pad_id) for row in np.atleast_2d(_integers(path))]
        else:
            raise ConfigError(f"input_tokens {path} ends in {path.suffix or 'nothing'}; give a .csv or a .npy file")
    except OSError as error:
        raise ConfigError(f"input_tokens {path} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, EOFError, csv.Error) as error:
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
        with tempfile.TemporaryFile(dir=path.resolve().parent):
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
        np.save(file, array)


def _integers(path: Path) -> np.ndarray:
    array = np.load(path, allow_pickle=False, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is a zip archive of arrays")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(f"it has type {array.dtype} and {array.ndim} dimensions")
    return array


def _unpadded(row: np.ndarray, pad_id: int) -> list[int]:
    ids = row.tolist()
    while ids and ids[-1] == pad_id:
        ids.pop()
    return ids
