"""From rows of a checkpoint's matrix to the fields of a weight record.

A converter takes whole rows, [n, in_features], and gives each field's n rows: nothing of a row depends on another, so
that a matrix may come in any blocks and be cut for any number of ranks.  types.py says which type has which.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baichuan.config import QuantConfig
from baichuan.quant.scaled import quantise
from baichuan.quant.weight_only import quantise_int4, quantise_int8

Converter = Callable[[Tensor], dict[str, Tensor]]


def cast(dtype: torch.dtype, field: str = "weight") -> Converter:
    """Only the type changes; field "" stands for the tensor's own name."""
    return lambda rows: {field: rows.to(dtype)}


def dense(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """records.DenseWeight.  dtype: of the model, here and below"""
    return cast(dtype)


def int8(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """records.Int8Weight"""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        weight, scale = quantise_int8(rows)
        return {"weight": weight, "scale": scale}

    return convert


def int4(quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """records.Int4Weight"""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        packed, scale = quantise_int4(rows, quant.group_size, dtype)
        return {"packed": packed, "scale": scale}

    return convert


def fp8(scale: float) -> Converter:
    """records.Fp8Weight but its input_scale.  scale: of the rows' projection, calibrated"""
    factor = torch.tensor(scale)

    def convert(rows: Tensor) -> dict[str, Tensor]:
        return {"weight": quantise(rows, factor, torch.float8_e4m3fn), "scale": factor.expand(len(rows))}

    return convert
