"""A pytorch_model.bin file as tensor sources: memory-mapped, and read without running what it contains."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import torch

from baichuan.errors import CheckpointError
from baichuan.weights.hub.quant_state import STATE_END, state_sources, todays_name
from baichuan.weights.hub.tensor_pickle import ForeignContent, StoredTensor, read_tensor_pickle
from baichuan.weights.source import TensorSource

MAX_PICKLE_BYTES = 16 << 20  # names, shapes and offsets; a 13B checkpoint's takes 60 kB
MAX_SHOWN = 100  # characters of a name
LOCAL_HEADER = struct.Struct("<26x2H")  # a zip record's header: the lengths of its name and its extra field


def open_bin(path: Path) -> dict[str, TensorSource]:
    """Every tensor of the file.

    Raises CheckpointError for a file that is damaged, holds anything but tensors and bitsandbytes' lists of them, or
    was written by PyTorch before 1.6.
    """
    _require_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _open_archive(path, archive)
    except ForeignContent:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, which only running code could load; "
            "download it again, or convert it to safetensors where you trust it"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and a damaged pickle raise several kinds
        raise CheckpointError(
            f"{path} is a truncated or damaged archive ({_first_line(error)}); download it again"
        ) from None


def _require_archive(path: Path) -> None:
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


def _open_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, TensorSource]:
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    size = entries["data.pkl"].file_size
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path} has {size} bytes of table of contents; at most {MAX_PICKLE_BYTES} are read")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
        raise ValueError("a record is compressed or encrypted")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("its numbers are not little-endian")
    values = read_tensor_pickle(archive.read(entries["data.pkl"]))
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not tensors by name; it is not a checkpoint")
    file_size = path.stat().st_size
    mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=file_size)
    sources: dict[str, TensorSource] = {}

    def source(stored: StoredTensor) -> TensorSource:
        return _source(mapped, file_size, archive, entries[f"data/{stored.key}"], stored)

    for name, value in values.items():
        if isinstance(value, list) and isinstance(name, str) and name.endswith(STATE_END):
            sources |= state_sources(name, value, source)
            continue
        if not isinstance(value, StoredTensor) or not isinstance(name, str):
            kind = "Tensor" if isinstance(value, StoredTensor) else type(value).__name__
            raise CheckpointError(
                f"{path} holds {repr(name)[:MAX_SHOWN]}, a {kind} that is not a plain tensor with a name; save the "
                "model's state_dict() alone"
            )
        sources[todays_name(name)] = source(value)
    return sources


def _source(mapped, file_size: int, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, value) -> TensorSource:
    """The tensor whose elements are in this record, which must be as long as the pickle says."""
    needed = value.record_elements * value.dtype.itemsize
    if entry.file_size < needed:
        raise ValueError(f"record {value.key[:MAX_SHOWN]} has {entry.file_size} bytes instead of {needed}")
    assert archive.fp is not None, "the archive is open"
    archive.fp.seek(entry.header_offset)
    start = entry.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(archive.fp.read(LOCAL_HEADER.size)))
    if start + needed > file_size or start % value.dtype.itemsize:
        raise ValueError(f"record {value.key[:MAX_SHOWN]} is not where it should be")
    record = mapped[start : start + needed]
    tensor = torch.empty(0, dtype=value.dtype).set_(record, value.offset, value.shape, value.stride)
    return TensorSource(
        value.shape,
        value.dtype,
        lambda first, stop: tensor[first:stop],
        read_columns=lambda first, stop: tensor[:, first:stop],
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
