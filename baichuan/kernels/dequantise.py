"""A quantised matrix written out in a float type, for products that take far longer than this copy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, to_float32, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.records import Int4Weight, Int8Weight


@triton.jit
def _dequantise(
    weight, scale, zero,
    width,
    out,
    INT4: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    stored = tl.load(weight + row * width + columns, mask, other=0)
    wait_for_inputs(OVERLAP)  # the memory of out may be what an earlier kernel still reads
    if INT4:
        byte = stored.to(tl.int8, bitcast=True)
        # A group is an even number of channels, so that both nibbles of a byte have the same scale.
        group = row * (2 * width // GROUP) + 2 * columns // GROUP
        factor = tl.load(scale + group, mask, other=0.0).to(tl.float32)
        even, odd = ((byte << 4) >> 4).to(tl.float32), (byte >> 4).to(tl.float32)
        if ZERO:
            base = tl.load(zero + group, mask, other=0).to(tl.float32)
            even, odd = even - base, odd - base
        both = tl.interleave(even * factor, odd * factor)
        target = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out + row * 2 * width + target, both.to(out.dtype.element_ty), target < 2 * width)
    else:
        value = to_float32(stored) * tl.load(scale + row)
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask)


DEQUANTISE = KernelSpec(_dequantise, ("weight", "scale", "zero"), ("width",), ("out",))


def dequantise_to(weight: Int8Weight | Int4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix that the weight stands for, rounded to dtype: [out_features, in_features]."""
    int4 = isinstance(weight, Int4Weight)
    stored, zero = (weight.packed, weight.zero) if int4 else (weight.weight, None)
    rows, width = stored.shape
    out = torch.empty(weight.shape, dtype=dtype, device=stored.device)
    block = min(next_power_of_2(width), 2048)
    group = weight.group_size if int4 else 0
    constants = {"INT4": int4, "ZERO": zero is not None, "GROUP": group, "BLOCK": block}
    inputs = (stored, weight.scale, weight.scale if zero is None else zero)
    DEQUANTISE.launch((rows, cdiv(width, block)), inputs, (width,), (out,), constants)
    return out
