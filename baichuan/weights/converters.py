"""From rows of a checkpoint's matrix to the fields of a weight record.

A converter takes whole rows, [n, in_features], and gives each field's n rows: each row is converted on its own,
so that a matrix may be read in any blocks and cut for any number of ranks.  types.py names each type's converter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baichuan.config import QuantConfig
from baichuan.quant.fp8 import E4M3, quantise_channels
from baichuan.quant.scaled import quantise
from baichuan.quant.weight_only import quantise_int4, quantise_int8

Converter = Callable[[Tensor], dict[str, Tensor]]


def cast(dtype: torch.dtype, field: str = "weight") -> Converter:
    """Change only the dtype; field "" stands for the tensor's own name."""
    return lambda rows: {field: rows.to(dtype)}


def dense(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """Fields of records.DenseWeight.  dtype: the model's, here and below."""
    return cast(dtype)


def int8(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """Fields of records.Int8Weight."""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        weight, scale = quantise_int8(rows)
        return {"weight": weight, "scale": scale}

    return convert


def int4(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """Fields of records.Int4Weight."""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        packed, scale = quantise_int4(rows, quant.group_size, dtype)
        return {"packed": packed, "scale": scale}

    return convert


def fp8(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """Fields of records.Fp8Weight with scales per channel, and per token."""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        weight, scale = quantise_channels(rows)
        return {"weight": weight, "scale": scale}

    return convert


def fp8_per_tensor(scale: float) -> Converter:
    """Fields of records.Fp8Weight except input_scale.  scale: the calibrated weight scale of the rows' projection."""
    factor = torch.tensor(scale)

    def convert(rows: Tensor) -> dict[str, Tensor]:
        return {"weight": quantise(rows, factor, E4M3), "scale": factor.expand(len(rows))}

    return convert
