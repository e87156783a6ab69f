"""A TensorRT network under construction: one method per operation, each checked; constants are kept alive."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.tensorrt.api import Api


class Graph:
    """Methods take and return the network's tensors (ITensor); `constant` makes one of a PyTorch tensor.

    names: each constant's name, by the tensor that it is made of.
    """

    def __init__(self, api: Api, network, names: Mapping[Tensor, str] | None = None):
        self.api, self.trt, self.network, self.names = api, api.trt, network, names or {}
        self.constants: dict[str, Tensor] = {}  # by layer name: TensorRT reads them from here while it builds
        self._made: dict[tuple[Tensor, tuple[int, ...]], Any] = {}  # the network's tensor of each tensor and shape

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]):
        tensor = self.network.add_input(name, self.api.dtype(dtype), tuple(shape))
        self.check(tensor, f"input {name}")
        return tensor

    def output(self, x, name: str) -> None:
        x.name = name
        self.network.mark_output(x)
        self.check(x, f"output {name}")

    def constant(self, tensor: Tensor, shape: Sequence[int] | None = None):
        """A constant of tensor's type, which may be given another shape; its memory is used as it is, not copied."""
        return self._constant(tensor, self.api.dtype(tensor.dtype), tensor.shape if shape is None else shape)

    def int4_constant(self, packed: Tensor, shape: Sequence[int]):
        """packed: two's complement nibbles, the even element in the low one."""
        return self._constant(packed, self.trt.int4, shape)

    def scalar(self, value: float, like):
        """A constant of like's type and number of dimensions, each of size 1."""
        return self.constant(torch.full((1,) * len(like.shape), value, dtype=self.torch_dtype(like)))

    def torch_dtype(self, x) -> torch.dtype:
        return self.api.torch_dtypes[x.dtype]

    def cast(self, x, dtype: torch.dtype):
        wanted = self.api.dtype(dtype)
        return x if x.dtype == wanted else self._out(self.network.add_cast(x, wanted), "cast")

    def binary(self, operation: str, a, b):
        layer = self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation))
        return self._out(layer, operation)

    def unary(self, operation: str, x):
        return self._out(self.network.add_unary(x, getattr(self.trt.UnaryOperation, operation)), operation)

    def sigmoid(self, x):
        return self._out(self.network.add_activation(x, self.trt.ActivationType.SIGMOID), "sigmoid")

    def reduce(self, operation: str, x):
        """Reduce the last dimension, which keeps size 1."""
        axes = 1 << (len(x.shape) - 1)
        return self._out(
            self.network.add_reduce(x, getattr(self.trt.ReduceOperation, operation), axes, True), operation
        )

    def select(self, condition, a, b):
        return self._out(self.network.add_select(condition, a, b), "select")

    def matmul(self, x, weight):
        """x @ weightᵀ"""
        keep, transpose = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self._out(self.network.add_matrix_multiply(x, keep, weight, transpose), "matrix product")

    def reshape(self, x, shape: Sequence[int], then: Sequence[int] | None = None):
        """Reshape, where 0 copies x's dimension and -1 is inferred, then permute."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = tuple(shape)
        if then:
            layer.second_transpose = tuple(then)
        return self._out(layer, f"reshape to {tuple(shape)}")

    def permute(self, x, order: Sequence[int]):
        layer = self.network.add_shuffle(x)
        layer.first_transpose = tuple(order)
        return self._out(layer, f"permutation {tuple(order)}")

    def take(self, x, index: int, axis: int):
        """x[index] along `axis`, which is removed."""
        return self.gather(x, self.constant(torch.tensor(index, dtype=torch.int32)), axis)

    def gather(self, x, indices, axis: int = 0):
        return self._out(self.network.add_gather(x, indices, axis), "gather")

    def concat(self, tensors: Sequence, axis: int):
        layer = self.network.add_concatenation(list(tensors))
        layer.axis = axis
        return self._out(layer, "concatenation")

    def first_columns(self, x, count: int):
        """x[:, :count] of a matrix with any number of rows."""
        shape = self._out(self.network.add_shape(x), "shape")  # [2] int64
        rows = self.gather(shape, self.constant(torch.zeros(1, dtype=torch.int32)))
        size = self.concat([rows, self.constant(torch.tensor([count]))], 0)
        layer = self.network.add_slice(x, (0, 0), (0, 0), (1, 1))
        layer.set_input(2, size)
        return self._out(layer, "slice")

    def quantize(self, x, scale: Tensor, dtype: torch.dtype):
        """quant.scaled.quantise(x, scale): x / scale, saturated and rounded.  scale: one float32"""
        if dtype == torch.int8:  # TensorRT saturates at -128, we at -127
            smallest = (-127 * scale).view((1,) * len(x.shape))
            x = self.binary("MAX", x, self.constant(smallest))
        layer = self.network.add_quantize(x, self.constant(scale, shape=()), self.api.dtype(dtype))
        return self._out(layer, "quantisation")

    def dequantize(self, x, scale: Tensor, dtype: torch.dtype, axis: int | None = None):
        """x * scale in `dtype`.  scale: one number, one per place along `axis`, or one per block of the last axis"""
        shape = () if scale.numel() == 1 and axis is None else scale.shape
        layer = self.network.add_dequantize(x, self.constant(scale, shape=shape), self.api.dtype(dtype))
        if layer is not None and axis is not None:
            layer.axis = axis
        return self._out(layer, "dequantisation")

    def rotary(self, x, cos, sin, positions, head_dim: int):
        """Half rotation.  x: [batch, heads, new, head_dim]; cos, sin: [positions, head_dim / 2]"""
        layer = self.network.add_rotary_embedding(x, cos, sin, False, head_dim)
        layer.set_input(3, positions)
        return self._out(layer, "rotary embedding")

    def cache_update(self, cache, new, write_index):
        """cache with `new` from write_index[b] of row b on.  cache: [batch, heads, capacity, head_dim]"""
        layer = self.network.add_kv_cache_update(cache, new, write_index, self.trt.KVCacheMode.LINEAR)
        return self._out(layer, "KV cache update")

    def attention(self, q, k, v, mask, decomposable: bool):
        """softmax(q kᵀ + mask) v; all [batch, heads, tokens, head_dim]"""
        softmax, none = self.trt.AttentionNormalizationOp.SOFTMAX, self.trt.CausalMaskKind.NONE
        layer = self.network.add_attention_v2(q, k, v, softmax, none)
        self.check(layer, "attention")
        layer.decomposable = decomposable
        layer.mask = mask
        if layer.mask is None:  # a refused mask is only logged
            raise UnsupportedError(
                f"{self.api.name} {self.api.version} refuses the attention mask; use --backend torch"
            )
        return self._out(layer, "attention")

    def all_reduce(self, x, operation: str, ranks: int):
        return self._collective(x, "ALL_REDUCE", operation, ranks)

    def all_gather(self, x, ranks: int):
        """The ranks' tensors one after another along dimension 0."""
        return self._collective(x, "ALL_GATHER", "NONE", ranks)

    def check(self, made, what: str) -> None:
        """Raise UnsupportedError when TensorRT refused it or logged an error."""
        self.api.log.raise_errors(f"the network's {what}")
        if made is None:
            raise UnsupportedError(f"{self.api.name} {self.api.version} refuses the network's {what}; use torch")

    def _collective(self, x, kind: str, reduction: str, ranks: int):
        operations = self.trt.CollectiveOperation, self.trt.ReduceOperation
        args = getattr(operations[0], kind), getattr(operations[1], reduction)
        layer = self.network.add_dist_collective(x, *args, -1, list(range(ranks)))
        self.check(layer, kind)
        layer.num_ranks = ranks
        layer.metadata = json.dumps({"kind": kind, "reduction": reduction, "ranks": ranks})  # the layer hides them
        return self._out(layer, kind)

    def _constant(self, tensor: Tensor, dtype, shape: Sequence[int]):
        key = tensor, tuple(shape)  # tensors are hashed by identity
        if key in self._made:
            return self._made[key]
        held = tensor.detach().contiguous()
        layer = self.network.add_constant(tuple(shape), self.trt.Weights(dtype, held.data_ptr(), math.prod(shape)))
        name = self.names.get(tensor, f"constant {len(self.constants)}")
        self.check(layer, f"constant {name}")
        layer.name = name if name not in self.constants else f"{name} as {tuple(shape)}"
        self.constants[layer.name] = held
        self._made[key] = layer.get_output(0)
        return self._made[key]

    def _out(self, layer, what: str):
        self.check(layer, what)
        return layer.get_output(0)
