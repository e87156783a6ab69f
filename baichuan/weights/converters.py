"""From rows of a checkpoint's matrix to the fields of a weight record.

A converter takes whole rows, [n, in_features], and gives each field's n rows: nothing of a row depends on another, so
that a matrix may come in any blocks and be cut for any number of ranks.  A new type of weight adds its converter here.
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


def int8(rows: Tensor) -> dict[str, Tensor]:
    """records.Int8Weight"""
    weight, scale = quantise_int8(rows)
    return {"weight": weight, "scale": scale}


def int4(group_size: int, dtype: torch.dtype) -> Converter:
    """records.Int4Weight; dtype: of the scales"""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        packed, scale = quantise_int4(rows, group_size, dtype)
        return {"packed": packed, "scale": scale}

    return convert


def fp8(scale: float) -> Converter:
    """records.Fp8Weight but its input_scale; every row has the calibrated scale of its projection."""
    factor = torch.tensor(scale)

    def convert(rows: Tensor) -> dict[str, Tensor]:
        return {"weight": quantise(rows, factor, torch.float8_e4m3fn), "scale": factor.expand(len(rows))}

    return convert


def converter(weights: str, quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """Of the weight types that need nothing but the weights; dtype: of the model."""
    match weights:
        case "none":
            return cast(dtype)
        case "int8":
            return int8
        case "int4":
            return int4(quant.group_size, dtype)
        case _:
            raise ValueError(f"{weights} weights need calibrated scales")
