"""`linear` on the CPU: each type of weight by the C kernels, or by a PyTorch operator where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.executors.cpu.library import instruction_sets
from baichuan.executors.cpu.native import FEW_ROWS, Kernels, Matrix
from baichuan.executors.cpu.reference_linear import linear as reference_linear
from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import scale_for
from baichuan.quant.smoothquant import quantise_input
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from baichuan.weights.types import product_of

# With one of these, oneDNN's products of many rows are 2 (bfloat16) or 4 (INT8) times as fast as the C kernels.
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
INT8_UNITS = {"avx512_vnni", "avx_vnni", "amx_int8"}

ManyRows = Callable[[Tensor, Communicator], Tensor]


@dataclass(frozen=True)
class Product:
    """How products with one weight are computed."""

    matrix: Matrix | None  # the weight for the C kernels; None = the reference computes the product
    many_rows: ManyRows | None = None  # a faster operator for more than FEW_ROWS rows
    dtype: torch.dtype | None = None  # the only result dtype that many_rows rounds once to; None = any dtype
    smoother: Tensor | None = None  # SmoothQuant's, where an input's scale is its maximum over all ranks

    def by_library(self, x: Tensor, out_dtype: torch.dtype) -> bool:
        return self.many_rows is not None and x.shape[0] > FEW_ROWS and self.dtype in (None, out_dtype)


def dense(weight: DenseWeight) -> Product:
    w = weight.weight
    if w.dtype == torch.bfloat16 and BFLOAT16_UNITS & instruction_sets():
        return Product(Matrix.of(weight, w), lambda x, comm: F.linear(x, w), w.dtype)
    return Product(Matrix.of(weight, w))


def int8(weight: Int8Weight) -> Product:
    return Product(Matrix.of(weight, weight.weight, weight.scale))


def int4(weight: Int4Weight) -> Product:
    return Product(Matrix.of(weight, weight.packed, weight.scale, zero=weight.zero))


def smooth_quant(weight: SmoothQuantWeight) -> Product:
    def many_rows(x: Tensor, comm: Communicator) -> Tensor:
        x8, input_scale = quantise_input(x, weight, comm)
        return torch._int_mm(x8, weight.weight.t()).float() * input_scale * weight.scale

    matrix = Matrix.of(weight, weight.weight, weight.scale, weight.input_scale, weight.smoother, w8a8=True)
    library = many_rows if INT8_UNITS & instruction_sets() else None
    return Product(matrix, library, smoother=weight.smoother if weight.input_scale is None else None)


def fp8(weight: Fp8Weight) -> Product:
    return Product(Matrix.of(weight, weight.weight, weight.scale, weight.input_scale))


class CpuLinear:
    """x @ Wᵀ accumulated in float32 (W8A8: int32) and rounded once."""

    def __init__(self, kernels: Kernels, comm: Communicator):
        self.kernels, self.comm = kernels, comm
        self._products: dict[Weight, Product] = {}

    def matrix_of(self, weight: Weight, x: Tensor) -> Matrix | None:
        """The weight for a fused kernel; None where an operator is faster or a scale needs the other ranks."""
        product = self._product_of(weight)
        alone = product.smoother is None or self.comm.world_size == 1
        return product.matrix if alone and not product.by_library(x, x.dtype) else None

    def __call__(self, x: Tensor, weight: Weight, out_dtype: torch.dtype) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]"""
        product = self._product_of(weight)
        if product.matrix is None:
            return reference_linear(x, weight, out_dtype, self.comm)
        if product.many_rows and product.by_library(x, out_dtype):
            return product.many_rows(x, self.comm).to(out_dtype)
        scales = None
        if product.smoother is not None and self.comm.world_size > 1:  # the scale of quantise_input
            absmax = (x.float() / product.smoother).abs().amax(-1, keepdim=True)
            scales = scale_for(self.comm.all_reduce_max(absmax), torch.int8)
        return self.kernels.product(x, product.matrix, out_dtype, scales)

    def _product_of(self, weight: Weight) -> Product:
        product = self._products.get(weight)
        if product is None:
            product = self._products[weight] = product_of(weight, "cpu")(weight)
        return product
