"""`linear` on a GPU: for each type of weight and number of rows the kernel that measures fastest (docs/performance.md).

What comes before a product may still be pending: a norm or a gated activation is computed by the kernel that suits the
product, inside the GEMV, on the way into its integers, or by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.cuda.dense_copies import DenseCopies
from baichuan.executors.cuda.products import fp8_product, int8_product, product
from baichuan.kernels.dequantise import dequantise_to
from baichuan.kernels.gemm import gemm
from baichuan.kernels.gemm_int4 import gemm_int4
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import CHUNK, gemv_int
from baichuan.kernels.norm import NormInput, add_rms_norm
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.parallel.comm import Communicator
from baichuan.quant.smoothquant import quantise_input
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight


@dataclass(frozen=True)
class GatedInput:
    """silu(gate) * up, still to be computed."""

    gate_up: Tensor  # [num_tokens, 2 * intermediate]


Input = Tensor | NormInput | GatedInput

# Without a dequantised copy of a weight (dense_copies.py), more rows than this have it dequantised each time.
GEMM_ROWS = 256
PAIR_ROWS = 2048  # the same for weights of bytes
DENSE_ROWS = 64  # more than these are left to cuBLAS


def num_rows(x: Input) -> int:
    match x:
        case NormInput():
            return x.x.shape[0]
        case GatedInput():
            return x.gate_up.shape[0]
    return x.shape[0]


def dtype_of(x: Input) -> torch.dtype:
    """The model's dtype, which a pending operation's operands have."""
    match x:
        case NormInput():
            return x.x.dtype
        case GatedInput():
            return x.gate_up.dtype
    return x.dtype


def materialise(x: Input) -> Tensor:
    """The pending operation's result in the model's dtype."""
    match x:
        case NormInput():
            return add_rms_norm(x.x, x.residual, x.weight, x.eps, total=x.total)[0]
        case GatedInput():
            return silu_mul(x.gate_up)[0]
    return x


def fits_pairs(x: Input) -> bool:
    """Whether 16-bit integers say all of x (store_row.PAIRS)."""
    return dtype_of(x) in (torch.float16, torch.bfloat16)


class CudaLinear:
    """x @ Wᵀ accumulated in float32 (W8A8: int32) and rounded once."""

    def __init__(self, comm: Communicator, own_kernels: bool, copies: DenseCopies | None = None):
        self.comm, self.copies = comm, copies or DenseCopies()
        self.own_kernels = own_kernels  # False = PyTorch's products alone (build.py --use_gemm_plugin off)

    def __call__(self, x: Input, weight: Weight, out_dtype: torch.dtype) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]"""
        if self._one_row(x, weight):
            return self._gemv(x, weight, out_dtype, gated=False)
        match weight:
            case DenseWeight(w):
                x = materialise(x)
                if self.own_kernels and x.shape[0] <= DENSE_ROWS and x.dtype != torch.float32:
                    return gemm(x, w, None, out_dtype)
                return product(x, w, out_dtype)
            case Int8Weight() | Int4Weight():
                return self._weight_only(x, weight, out_dtype)
            case SmoothQuantWeight(q, scale) | Fp8Weight(q, scale):
                x8, x_scale = self._input(x, weight)
                if self.own_kernels:
                    return gemm(x8, q, scale, out_dtype, x_scale)
                library = int8_product if q.dtype == torch.int8 else fp8_product
                return library(x8, x_scale, q, scale, out_dtype)
        raise UnsupportedError(f"the CUDA executor has no linear for {type(weight).__name__}")

    def gated(self, x: Input, weight: Weight, dtype: torch.dtype) -> Input:
        """silu(first half of x @ Wᵀ) * second half, perhaps pending."""
        if self._one_row(x, weight):
            return self._gemv(x, weight, dtype, gated=True)
        return GatedInput(self(x, weight, dtype))

    def _weight_only(self, x: Input, weight: Int8Weight | Int4Weight, out_dtype: torch.dtype) -> Tensor:
        stored, scale = vars(weight).values()
        dense = self.copies.get(weight, dtype_of(x), num_rows(x))
        if dense is not None:
            return self(x, DenseWeight(dense), out_dtype)
        if self.own_kernels:
            if isinstance(weight, Int8Weight) and num_rows(x) <= PAIR_ROWS and fits_pairs(x):
                pairs, x_scale = self._as_operand(x, torch.int16)
                return gemm(pairs, stored, scale, out_dtype, x_scale, pairs=True)
            if num_rows(x) <= GEMM_ROWS:
                if isinstance(weight, Int4Weight):
                    return gemm_int4(self._as_operand(x, None, even_odd=True)[0], stored, scale, out_dtype)
                return gemm(materialise(x), stored, scale, out_dtype)
        x = materialise(x)
        return product(x, dequantise_to(stored, scale, x.dtype), out_dtype)

    def _one_row(self, x: Input, weight: Weight) -> bool:
        """Whether a GEMV kernel takes this product; for FP8 the tensor cores are faster even then."""
        if not self.own_kernels or num_rows(x) != 1:
            return False
        match weight:
            case DenseWeight():
                return True
            case SmoothQuantWeight(q):
                return q.shape[1] % 16 == 0
            case Int8Weight(q):
                return fits_pairs(x) and q.shape[1] % 16 == 0
            case Int4Weight(packed, scale):
                return fits_pairs(x) and packed.shape[1] * 2 // scale.shape[1] % CHUNK == 0
        return False

    def _gemv(self, x: Input, weight: Weight, out_dtype: torch.dtype, gated: bool) -> Tensor:
        match weight:
            case DenseWeight(w):
                return gemv(materialise(x), w, out_dtype, gated)
            case Int8Weight(q, scale) | Int4Weight(q, scale):
                pairs, x_scale = self._as_operand(x, torch.int16, even_odd=q.dtype == torch.uint8)
                return gemv_int(pairs, x_scale, q, scale, out_dtype, gated)
            case SmoothQuantWeight(q, scale):
                x8, x_scale = self._input(x, weight)
                return gemv_int(x8, x_scale, q, scale, out_dtype, gated)
        raise UnsupportedError(f"the CUDA executor has no GEMV for {type(weight).__name__}")

    def _input(self, x: Input, weight: SmoothQuantWeight | Fp8Weight) -> tuple[Tensor, Tensor]:
        """x as the 8-bit numbers that the weight asks for, and their scale, for each row or for all."""
        smoother, scale = getattr(weight, "smoother", None), weight.input_scale
        if scale is None and smoother is not None and self.comm.world_size > 1:
            return quantise_input(materialise(x), weight, self.comm)  # a token's maximum is over the ranks
        return self._as_operand(x, weight.weight.dtype, scale, smoother)

    def _as_operand(
        self,
        x: Input,
        dtype: torch.dtype | None,
        scale: Tensor | None = None,
        smoother: Tensor | None = None,
        even_odd: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x in the form of row_output and store_row, by the kernel that also makes x."""
        match x:
            case NormInput() if smoother is None:
                q, _, scale = add_rms_norm(x.x, x.residual, x.weight, x.eps, dtype, scale, x.total, even_odd)
                return q, scale
            case GatedInput():
                return silu_mul(x.gate_up, dtype, scale, smoother, even_odd)
        return quantise_rows(materialise(x), dtype, scale, smoother, even_odd)
