"""A pytorch_model.bin file as tensor sources: memory-mapped, and read without running what it contains."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.weights.source import TensorSource

MAX_PICKLE_BYTES = 16 << 20  # names, shapes and offsets; a 13B checkpoint's takes 60 kB


def open_bin(path: Path) -> dict[str, TensorSource]:
    """Every tensor of the file.

    Raises CheckpointError for a file that is damaged, holds anything but tensors, or was written by PyTorch before 1.6.
    """
    _check_archive(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, which only running code could load; "
            "download it again, or convert it to safetensors where you trust it"
        ) from None
    except Exception as error:  # a damaged pickle is a program with errors of any type
        raise CheckpointError(f"{path} is a damaged .bin file ({_first_line(error)}); download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not tensors by name; it is not a checkpoint")
    return {name: _source(path, name, value) for name, value in values.items()}


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless the file is a complete archive with a small table of contents."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); download it again") from None
    if start != b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is not a zip archive, so that it cannot be memory-mapped: it is damaged, or PyTorch before 1.6 "
            "wrote it; convert it once with torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile has several for damaged fields
        raise CheckpointError(
            f"{path} is a truncated or damaged archive ({_first_line(error)}); download it again"
        ) from None
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    if sum(pickles) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path} has {sum(pickles)} bytes of table of contents; at most {MAX_PICKLE_BYTES} are read"
        )


def _source(path: Path, name: str, value) -> TensorSource:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or not isinstance(name, str):
        raise CheckpointError(f"{path} holds {name!r}, a {type(value).__name__} that is not a plain tensor with a name")
    tensor = value.detach()
    return TensorSource(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
