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
    weight, scale,
    width,
    out,
    INT4: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
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
        factor = tl.load(scale + row * (2 * width // GROUP) + 2 * columns // GROUP, mask, other=0.0).to(tl.float32)
        even = ((byte << 4) >> 4).to(tl.float32) * factor
        odd = (byte >> 4).to(tl.float32) * factor
        both = tl.interleave(even, odd)
        target = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out + row * 2 * width + target, both.to(out.dtype.element_ty), target < 2 * width)
    else:
        value = to_float32(stored) * tl.load(scale + row)
        tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask)


DEQUANTISE = KernelSpec(_dequantise, ("weight", "scale"), ("width",), ("out",))


def dequantise_to(weight: Int8Weight | Int4Weight, dtype: torch.dtype) -> Tensor:
    """The matrix that the weight stands for, rounded to dtype: [out_features, in_features]."""
    int4 = isinstance(weight, Int4Weight)
    stored = weight.packed if int4 else weight.weight
    rows, width = stored.shape
    out = torch.empty(weight.shape, dtype=dtype, device=stored.device)
    block = min(next_power_of_2(width), 2048)
    constants = {"INT4": int4, "GROUP": weight.group_size if int4 else 0, "BLOCK": block}
    DEQUANTISE.launch((rows, cdiv(width, block)), (stored, weight.scale), (width,), (out,), constants)
    return out
