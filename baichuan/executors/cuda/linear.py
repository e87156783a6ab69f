"""`linear` on a GPU: for each type of weight and number of tokens the kernel that measures fastest
(docs/performance.md), and the form in which it takes its input.

One function for each type of weight, by weights/types.py, chooses.  An example, INT4 in float16 with groups of 32:

    1 token            gemv_int, x as 16-bit integers
    a few              gemm_int4, x in float16
    copy_rows or more  cuBLAS with a dequantised copy of the weight, where memory is spare (dense_copies.py)
    without a copy     gemm_int4 for up to GEMM_ROWS tokens, then cuBLAS with a copy that is made for the one product
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import triton
from torch import Tensor

from baichuan.executors.cuda.dense_copies import DenseCopies
from baichuan.executors.cuda.products import fp8_in_library, fp8_product, fp8_sums, int8_product, product
from baichuan.kernels.dequantise import dequantise_to
from baichuan.kernels.gemm import gemm
from baichuan.kernels.gemm_int4 import gemm_int4
from baichuan.kernels.gemm_parts import scale_sums
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import BYTE_CHANNELS, NIBBLE_CHANNELS, gemv_int
from baichuan.kernels.operand import (
    Deinterleaved,
    E4m3PerToken,
    Form,
    Int8PerToken,
    Int16,
    Operand,
    Plain,
    StaticScale,
)
from baichuan.kernels.peers import Slots
from baichuan.kernels.spec import overlaps
from baichuan.parallel.comm import Communicator, Solo
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from baichuan.weights.types import product_of

# Up to this many tokens our kernel is faster than cuBLAS with a weight that is dequantised for the one product.
GEMM_ROWS = 256
INT16_ROWS = 2048  # the same for an INT8 weight and x as 16-bit integers
DENSE_ROWS = 64  # up to this many our kernel is faster than cuBLAS with a dense weight or one in e4m3
GLUON_ROWS = 33  # from this many on gemm_int8.py is faster than gemm.py for W8A8 ...
ACTIVATED_ROWS = 256  # ... and from this many on with the activation in it
GLUON_VERSIONS = (3, 6), (3, 9)  # the first and the last of Triton whose Gluon gemm_int8.py is written for


@dataclass(frozen=True)
class LinearKernel:
    """x @ Wᵀ for one weight and number of tokens, accumulated in float32 (W8A8: int32) and rounded once."""

    form: Form  # the form in which it takes x
    run: Callable[[Operand, torch.dtype], Tensor]  # (x, out_dtype) -> [num_tokens, out_features]
    # As run, with silu(first half) * second half of the product, [num_tokens, out_features / 2]; None = it cannot.
    run_gated: Callable[[Operand, torch.dtype], Tensor] | None = None
    # As run; what it makes also goes to the peers' slots (kernels/peers.py).  None = it cannot.
    run_sending: Callable[[Operand, torch.dtype, Slots], Tensor] | None = None
    # silu.silu_mul of what run makes in the dtype, in this form of int8; None = it cannot.
    run_activated: Callable[[Operand, torch.dtype, StaticScale], Operand] | None = None


@dataclass(frozen=True)
class Choice:
    """What decides between kernels, beside the weight."""

    num_tokens: int
    dtype: torch.dtype  # type of x, which is the model's
    comm: Communicator = Solo()
    own_kernels: bool = True  # False = PyTorch's products alone (build.py --use_gemm_plugin off)
    copies: DenseCopies = field(default_factory=DenseCopies)

    @property
    def gemv(self) -> bool:
        """Whether the product is a matrix times one token, for a kernel of ours."""
        return self.own_kernels and self.num_tokens == 1

    @property
    def int16(self) -> bool:
        """Whether 16-bit integers can hold what x holds (operand.Int16)."""
        return self.dtype in (torch.float16, torch.bfloat16)


def choose_kernel(weight: Weight, choice: Choice) -> LinearKernel:
    """What the function below that weights/types.py names chooses.  Raises UnsupportedError for an unknown type."""
    return product_of(weight, "cuda")(weight, choice)


def dense(weight: DenseWeight, choice: Choice) -> LinearKernel:
    w = weight.weight
    if choice.gemv:
        return LinearKernel(
            Plain(),
            lambda x, out_dtype: gemv(x.values, w, out_dtype),
            lambda x, out_dtype: gemv(x.values, w, out_dtype, gated=True),
            lambda x, out_dtype, slots: gemv(x.values, w, out_dtype, slots=slots),
        )
    if choice.own_kernels and choice.num_tokens <= DENSE_ROWS and choice.dtype != torch.float32:
        return LinearKernel(Plain(), lambda x, out_dtype: gemm(x, w, None, out_dtype))
    return LinearKernel(Plain(), lambda x, out_dtype: product(x.values, w, out_dtype))


def int8(weight: Int8Weight, choice: Choice) -> LinearKernel:
    q, scale = weight.weight, weight.scale
    if choice.gemv and choice.int16 and weight.shape[1] % BYTE_CHANNELS == 0:
        return _integer_gemv(Int16(), q, scale)
    copy = choice.copies.get(weight, choice.dtype, choice.num_tokens)
    if copy is not None:
        return dense(copy, choice)
    if choice.own_kernels and choice.int16 and choice.num_tokens <= INT16_ROWS:
        return LinearKernel(Int16(), lambda x, out_dtype: gemm(x, q, scale, out_dtype))
    if choice.own_kernels and choice.num_tokens <= GEMM_ROWS:
        return LinearKernel(Plain(), lambda x, out_dtype: gemm(x, q, scale, out_dtype))
    return _dequantised_each_time(weight)


def int4(weight: Int4Weight, choice: Choice) -> LinearKernel:
    packed, scale, zero = weight.packed, weight.scale, weight.zero
    if choice.gemv and choice.int16 and weight.group_size % NIBBLE_CHANNELS == 0:
        sums = None if zero is None else weight.group_size
        return _integer_gemv(Int16(deinterleaved=True, sums=sums), packed, scale, zero)
    copy = choice.copies.get(weight, choice.dtype, choice.num_tokens)
    if copy is not None:
        return dense(copy, choice)
    if choice.own_kernels and choice.num_tokens <= GEMM_ROWS:
        return LinearKernel(Deinterleaved(), lambda x, out_dtype: gemm_int4(x, packed, scale, out_dtype, zero=zero))
    return _dequantised_each_time(weight)


def smooth_quant(weight: SmoothQuantWeight, choice: Choice) -> LinearKernel:
    q, scale = weight.weight, weight.scale
    # A weight with a smoother holds a rank's share of the input channels; a token's scale is by all of them.
    form: Form = Int8PerToken(weight.smoother, weight.smoother is not None and choice.comm.world_size > 1)
    if weight.input_scale is not None:
        form = StaticScale(torch.int8, weight.input_scale, weight.smoother)
    if choice.gemv and weight.shape[1] % BYTE_CHANNELS == 0:
        return _integer_gemv(form, q, scale)
    if choice.own_kernels and choice.num_tokens >= GLUON_ROWS and in_gluon(q):
        return _gluon(form, q, scale, choice.num_tokens >= ACTIVATED_ROWS)
    if choice.own_kernels:
        return LinearKernel(form, lambda x, out_dtype: gemm(x, q, scale, out_dtype))
    return LinearKernel(form, lambda x, out_dtype: int8_product(*x.scaled, q, scale, out_dtype))


def in_gluon(weight: Tensor) -> bool:
    """Whether gemm_int8.py takes this int8 matrix: on Hopper, in rows of whole 16 bytes."""
    aligned = weight.is_contiguous() and weight.data_ptr() % 16 == weight.shape[1] % 16 == 0
    return aligned and has_gluon(weight.device, triton.__version__)


@lru_cache
def has_gluon(device: torch.device, triton_version: str) -> bool:
    first, last = GLUON_VERSIONS
    known = first <= tuple(map(int, triton_version.split(".")[:2])) <= last
    return known and overlaps(device) and torch.cuda.get_device_capability(device) == (9, 0)


def _gluon(form: Form, q: Tensor, scale: Tensor, activates: bool) -> LinearKernel:
    from baichuan.kernels.gemm_int8 import gated_int8, gemm_int8  # other versions of Triton may lack what it imports

    def run_activated(x: Operand, dtype: torch.dtype, out_form: StaticScale) -> Operand:
        return gated_int8(x, q, scale, out_form, dtype)

    return LinearKernel(
        form,
        lambda x, out_dtype: gemm_int8(x, q, scale, out_dtype),
        run_activated=run_activated if activates else None,
    )


def fp8(weight: Fp8Weight, choice: Choice) -> LinearKernel:
    """On the tensor cores even for one token, which measures faster than a GEMV."""
    q, scale, form = weight.weight, weight.scale, _fp8_form(weight)
    if choice.own_kernels and (choice.num_tokens <= DENSE_ROWS or not fp8_in_library(q)):
        return LinearKernel(form, lambda x, out_dtype: gemm(x, q, scale, out_dtype))
    if choice.own_kernels:
        return LinearKernel(
            form, lambda x, out_dtype: scale_sums(fp8_sums(x.values, q), *x.scaled[1:], scale, out_dtype)
        )
    return LinearKernel(form, lambda x, out_dtype: fp8_product(*x.scaled, q, scale, out_dtype))


def _fp8_form(weight: Fp8Weight) -> Form:
    return E4m3PerToken() if weight.input_scale is None else StaticScale(weight.weight.dtype, weight.input_scale)


def _integer_gemv(form: Form, stored: Tensor, scale: Tensor, zero: Tensor | None = None) -> LinearKernel:
    return LinearKernel(
        form,
        lambda x, out_dtype: gemv_int(x, stored, scale, out_dtype, zero=zero),
        lambda x, out_dtype: gemv_int(x, stored, scale, out_dtype, gated=True, zero=zero),
        lambda x, out_dtype, slots: gemv_int(x, stored, scale, out_dtype, zero=zero, slots=slots),
    )


def _dequantised_each_time(weight: Int8Weight | Int4Weight) -> LinearKernel:
    def run(x: Operand, out_dtype: torch.dtype) -> Tensor:
        return product(x.values, dequantise_to(weight, x.values.dtype), out_dtype)

    return LinearKernel(Plain(), run)
