"""`linear` as TensorRT layers, for every type of weight."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.executors.tensorrt.network import Graph
from baichuan.quant.scaled import LIMITS
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from baichuan.weights.types import product_of

INT4_BLOCKS = (128, 64, 32, 16)  # input channels per scale that the fused kernel supports
SMALLEST_SCALE = 1e-20  # divides a token of zeros, which stays zero


def linear(graph: Graph, x, weight: Weight, ranks: int):
    """x @ Wᵀ in x's type.  x: [..., in_features], two or three dimensions; ranks: tp_size.

    Integer and FP8 products are written as quantise, dequantise, multiply: TensorRT multiplies the integers themselves
    and scales the sums, which the compiled plan shows.
    """
    return product_of(weight, "tensorrt")(graph, x, weight, ranks)


def dense(graph: Graph, x, weight: DenseWeight, ranks: int):
    return graph.matmul(x, graph.constant(weight.weight, shape=(*_lead(x), *weight.shape)))


def int8(graph: Graph, x, weight: Int8Weight, ranks: int):
    return graph.matmul(x, _dequantised(graph, x, weight, graph.torch_dtype(x)))


def int4(graph: Graph, x, weight: Int4Weight, ranks: int):
    dtype, group = graph.torch_dtype(x), weight.group_size
    block = next((size for size in INT4_BLOCKS if group % size == 0), group)
    scale = weight.scale.to(dtype).repeat_interleave(group // block, dim=1)
    matrix = graph.int4_constant(weight.packed, (*_lead(x), *weight.shape))
    y = graph.matmul(x, graph.dequantize(matrix, scale.view(*_lead(x), *scale.shape), dtype))
    return y if weight.zero is None else graph.binary("SUB", y, _product_of_zeros(graph, x, weight, dtype))


def _product_of_zeros(graph: Graph, x, weight: Int4Weight, dtype: torch.dtype):
    """What the zeros take off: x's sums over each group @ (zero * scale)ᵀ.  TensorRT's 4-bit numbers have no zero."""
    assert weight.zero is not None
    wide = graph.cast(x, torch.float32)
    sums = graph.reduce("SUM", graph.reshape(wide, (*[0] * (len(x.shape) - 1), weight.scale.shape[1], -1)))
    sums = graph.reshape(sums, (*[0] * (len(x.shape) - 1), weight.scale.shape[1]))
    zeros = weight.zero.float() * weight.scale.float()
    return graph.cast(graph.matmul(sums, graph.constant(zeros, shape=(*_lead(x), *zeros.shape))), dtype)


def smooth_quant(graph: Graph, x, weight: SmoothQuantWeight, ranks: int):
    dtype, smooth = graph.torch_dtype(x), _smoothed(graph, x, weight)
    if weight.input_scale is not None:
        return _product_of_8_bits(graph, smooth, weight, weight.input_scale, dtype)
    absmax = graph.reduce("MAX", graph.unary("ABS", smooth))
    if weight.smoother is not None and ranks > 1:
        absmax = graph.all_reduce(absmax, "MAX", ranks)
    return _product_per_token(graph, smooth, absmax, weight, dtype)


def fp8(graph: Graph, x, weight: Fp8Weight, ranks: int):
    wide, dtype = graph.cast(x, torch.float32), graph.torch_dtype(x)
    if weight.input_scale is not None:
        return _product_of_8_bits(graph, wide, weight, weight.input_scale, dtype)
    return _product_per_token(graph, wide, graph.reduce("MAX", graph.unary("ABS", wide)), weight, dtype)


def _product_of_8_bits(graph: Graph, x, weight: SmoothQuantWeight | Fp8Weight, input_scale: Tensor, dtype: torch.dtype):
    """x: float32 -> dtype"""
    x8 = _rounded(graph, x, input_scale, weight.weight.dtype)
    return graph.cast(graph.matmul(x8, _dequantised(graph, x, weight, torch.float32)), dtype)


def _product_per_token(graph: Graph, x, absmax, weight: SmoothQuantWeight | Fp8Weight, dtype: torch.dtype):
    """x: float32; absmax: a layer's output, each token's largest magnitude -> dtype"""
    input_scale = graph.binary("DIV", absmax, graph.scalar(LIMITS[weight.weight.dtype], absmax))
    input_scale = graph.binary("MAX", input_scale, graph.scalar(SMALLEST_SCALE, input_scale))
    x8 = _rounded(graph, graph.binary("DIV", x, input_scale), torch.ones(1), weight.weight.dtype)
    y = graph.matmul(x8, _dequantised(graph, x, weight, torch.float32))
    return graph.cast(graph.binary("PROD", y, input_scale), dtype)


def _lead(x) -> tuple[int, ...]:
    """The leading dimensions of size 1 that give a matrix as many dimensions as x."""
    return (1,) * (len(x.shape) - 2)


def _dequantised(graph: Graph, x, weight: Int8Weight | SmoothQuantWeight | Fp8Weight, dtype: torch.dtype):
    """The weight's matrix with x's number of dimensions, scaled by output channels."""
    matrix = graph.constant(weight.weight, shape=(*_lead(x), *weight.shape))
    return graph.dequantize(matrix, weight.scale, dtype, len(_lead(x)))


def _smoothed(graph: Graph, x, weight: SmoothQuantWeight):
    x = graph.cast(x, torch.float32)
    if weight.smoother is None:
        return x
    shape = (*(1,) * (len(x.shape) - 1), weight.smoother.shape[0])
    return graph.binary("DIV", x, graph.constant(weight.smoother, shape=shape))


def _rounded(graph: Graph, x, scale, dtype: torch.dtype):
    """x rounded to 8 bits: dequantise(quantise(x))."""
    return graph.dequantize(graph.quantize(x, scale, dtype), scale, torch.float32)
