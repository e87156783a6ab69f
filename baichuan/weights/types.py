"""Every weight type, and where its parts are found.

A new type takes a record in records.py, the functions that its entry here names, and its name in
config.WEIGHT_TYPES.  A product is named as `module:function` and imported when it is first used: Triton and TensorRT
are not installed everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name

import torch

from baichuan.config import QuantConfig
from baichuan.errors import UnsupportedError
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from baichuan.weights import converters
from baichuan.weights.converters import Converter


@dataclass(frozen=True)
class Numbers:
    """A number format that a GPU must be able to multiply."""

    name: str  # as messages call it
    compute_capability: tuple[int, int]  # the lowest that can multiply it
    instead: str  # what to build for an older GPU


INT8 = Numbers("INT8", (8, 0), "build with --weight_only_precision int4")
FP8 = Numbers("FP8", (8, 9), "build with --use_smooth_quant or --int8_kv_cache")


@dataclass(frozen=True)
class WeightType:
    """One weight type.  Its products compute y = x @ Wᵀ by the record's formula, with these signatures:

    reference(x, weight, out_dtype, comm) -> y
    cpu(weight) -> executors.cpu.linear.Product
    cuda(weight, choice) -> executors.cuda.linear.LinearKernel
    tensorrt(graph, x, weight, ranks) -> y
    """

    record: type  # its class in records.py
    label: str  # as reports call it
    products: Mapping[str, str]  # `module:function`, by executor
    numbers: Numbers | None = None  # the CUDA products' format; None = the model's dtype
    converter: Callable[[QuantConfig, torch.dtype], Converter] | None = None  # from weights alone; None = calibrated


def _products(function: str) -> dict[str, str]:
    return {
        "reference": f"baichuan.executors.cpu.reference_linear:{function}",
        "cpu": f"baichuan.executors.cpu.linear:{function}",
        "cuda": f"baichuan.executors.cuda.linear:{function}",
        "tensorrt": f"baichuan.executors.tensorrt.linear:{function}",
    }


TYPES = {  # by config.QuantConfig.weights
    "none": WeightType(DenseWeight, "", _products("dense"), converter=converters.dense),
    "int8": WeightType(Int8Weight, "INT8 weight-only", _products("int8"), INT8, converters.int8),
    "int4": WeightType(Int4Weight, "INT4 weight-only", _products("int4"), converter=converters.int4),
    "smooth_quant": WeightType(SmoothQuantWeight, "SmoothQuant", _products("smooth_quant"), INT8),
    "fp8": WeightType(Fp8Weight, "FP8", _products("fp8"), FP8, converters.fp8),
}
_BY_RECORD = {each.record: each for each in TYPES.values()}


def needs_calibration(quant: QuantConfig) -> bool:
    """Whether the weights need scales, or integers, that are found on texts."""
    if quant.weights == "fp8":
        return not (quant.per_token and quant.per_channel)
    return TYPES[quant.weights].converter is None


def converter_of(weights: str, quant: QuantConfig, dtype: torch.dtype) -> Converter:
    """The converter of rows to the type `weights`, which needs no calibration.  dtype: the model's."""
    make = TYPES[weights].converter
    if make is None:
        raise ValueError(f"{weights} weights need calibration")
    return make(quant, dtype)


def product_of(weight: Weight, executor: str) -> Callable:
    """The function that an executor multiplies with.  Raises UnsupportedError where it has none."""
    found = _BY_RECORD.get(type(weight))
    if found is None or executor not in found.products:
        raise UnsupportedError(
            f"the {executor} executor has no linear for {type(weight).__name__}; take another --backend"
        )
    return _imported(found.products[executor])


@cache
def _imported(name: str) -> Callable:
    return resolve_name(name)
