"""`linear` as TensorRT layers, for every type of weight."""

from __future__ import annotations

import torch

from baichuan.errors import UnsupportedError
from baichuan.executors.tensorrt.network import Graph
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight

INT4_BLOCKS = (128, 64, 32, 16)  # input channels a scale that the fused kernel takes
SMALLEST_SCALE = 1e-20  # a token of zeros is divided by this and stays zero


def linear(graph: Graph, x, weight: Weight, ranks: int):
    """x @ Wᵀ in x's type.  x: [..., in_features], two or three dimensions; ranks: of the tensor parallelism.

    Integer and FP8 products are written as quantise, dequantise, multiply: TensorRT multiplies the integers themselves
    and scales the sums, which the compiled plan shows.
    """
    dtype, lead = graph.torch_dtype(x), (1,) * (len(x.shape) - 2)
    channel = len(lead)  # the weight's dimension of output channels

    def dequantised(matrix, scale, to):
        return graph.dequantize(graph.constant(matrix, shape=(*lead, *matrix.shape)), scale, to, channel)

    match weight:
        case DenseWeight(w):
            return graph.matmul(x, graph.constant(w, shape=(*lead, *w.shape)))
        case Int8Weight(q, scale):
            return graph.matmul(x, dequantised(q, scale, dtype))
        case Int4Weight():
            return graph.matmul(x, _int4(graph, weight, lead, dtype))
        case SmoothQuantWeight(q, scale, None, _):
            smooth = _smoothed(graph, x, weight)
            absmax = graph.reduce("MAX", graph.unary("ABS", smooth))
            if weight.smoother is not None and ranks > 1:
                absmax = graph.all_reduce(absmax, "MAX", ranks)
            input_scale = graph.binary("DIV", absmax, graph.scalar(127, absmax))
            input_scale = graph.binary("MAX", input_scale, graph.scalar(SMALLEST_SCALE, input_scale))
            x8 = _rounded(graph, graph.binary("DIV", smooth, input_scale), torch.ones(1), torch.int8)
            y = graph.matmul(x8, dequantised(q, scale, torch.float32))
            return graph.cast(graph.binary("PROD", y, input_scale), dtype)
        case SmoothQuantWeight(q, scale, input_scale, _):
            x8 = _rounded(graph, _smoothed(graph, x, weight), input_scale, torch.int8)
            return graph.cast(graph.matmul(x8, dequantised(q, scale, torch.float32)), dtype)
        case Fp8Weight(q, scale, input_scale):
            x8 = _rounded(graph, graph.cast(x, torch.float32), input_scale, q.dtype)
            return graph.cast(graph.matmul(x8, dequantised(q, scale, torch.float32)), dtype)
        case _:
            raise UnsupportedError(f"TensorRT networks have no linear for {type(weight).__name__}; use --backend torch")


def _smoothed(graph: Graph, x, weight: SmoothQuantWeight):
    x = graph.cast(x, torch.float32)
    if weight.smoother is None:
        return x
    shape = (*(1,) * (len(x.shape) - 1), weight.smoother.shape[0])
    return graph.binary("DIV", x, graph.constant(weight.smoother, shape=shape))


def _rounded(graph: Graph, x, scale, dtype: torch.dtype):
    """What 8 bits hold of x: dequantise(quantise(x))."""
    return graph.dequantize(graph.quantize(x, scale, dtype), scale, torch.float32)


def _int4(graph: Graph, weight: Int4Weight, lead: tuple[int, ...], dtype: torch.dtype):
    out_features, in_features = weight.packed.shape[0], 2 * weight.packed.shape[1]
    group = in_features // weight.scale.shape[1]
    block = next((size for size in INT4_BLOCKS if group % size == 0), group)
    scale = weight.scale.to(dtype).repeat_interleave(group // block, dim=1)
    matrix = graph.int4_constant(weight.packed, (*lead, out_features, in_features))
    return graph.dequantize(matrix, scale.view(*lead, *scale.shape), dtype)
