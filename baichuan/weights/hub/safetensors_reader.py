"""A .safetensors file as tensor sources: memory-mapped, no bytes are read before they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baichuan.errors import CheckpointError
from baichuan.weights.safetensors_header import require_small_header
from baichuan.weights.source import TensorSource

# https://github.com/huggingface/safetensors#format; no weight has a type that is not listed here
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_safetensors(path: Path) -> dict[str, TensorSource]:
    """Every tensor of the file.  Raises CheckpointError for a file that is damaged or no safetensors file."""
    try:
        require_small_header(path)
        file = safe_open(path, framework="pt")
        return {name: _source(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); download it again") from None


def _source(path: Path, name: str, rows) -> TensorSource:
    if rows.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{path} holds {name} as {rows.get_dtype()}, which is not a known type; download it again"
        )
    shape, dtype = tuple(rows.get_shape()), _DTYPES[rows.get_dtype()]
    return TensorSource(
        shape, dtype, lambda start, stop: rows[start:stop], read_columns=lambda start, stop: rows[:, start:stop]
    )
