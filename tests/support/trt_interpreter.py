"""An interpreter of TensorRT networks in PyTorch: what an INetworkDefinition means by TensorRT's documentation.

Each layer is read back from the network itself; nothing of lowering.py is used but the constants' values, which
TensorRT does not give back for every type.  Products, means and softmax are taken in float32 and rounded once to the
type that the network gives their result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from baichuan.executors.tensorrt.api import Api
from baichuan.parallel.comm import Communicator, Solo
from baichuan.quant.weight_only import unpack_int4

LIMITS = {torch.int8: (-128, 127), torch.float8_e4m3fn: (-448, 448)}


class Interpreter:
    """Runs a network.  constants: the values of its constant layers, by layer name."""

    def __init__(self, api: Api, network, constants: Mapping[str, Tensor], comm: Communicator | None = None):
        self.api, self.trt, self.network, self.constants, self.comm = api, api.trt, network, constants, comm or Solo()
        self.layers = [self._open(network.get_layer(index)) for index in range(network.num_layers)]
        self.inputs = [network.get_input(index).name for index in range(network.num_inputs)]
        self.outputs = [network.get_output(index).name for index in range(network.num_outputs)]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name.  The tensors of KV cache inputs are changed, as a cache update does."""
        assert set(inputs) == set(self.inputs), set(inputs) ^ set(self.inputs)
        for index in range(self.network.num_inputs):
            self._check(self.network.get_input(index), inputs[self.network.get_input(index).name])
        values = dict(inputs)
        for kind, layer in self.layers:
            tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
            arguments = [None if each is None else values[each.name] for each in tensors]
            result, out = getattr(self, kind)(layer, *arguments), layer.get_output(0)
            if kind != "attention_input":
                result = result.to(self._dtype(out))
                self._check(out, result)
            values[out.name] = result
        return {name: values[name] for name in self.outputs}

    def _open(self, layer):
        """A layer's kind and the layer as its own class, which has its attributes."""
        kind = self.trt.ILayer.type.fget(layer).name
        classes = {"ELEMENTWISE": "IElementWiseLayer", "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "TOPK": "ITopKLayer"}
        classes["KV_CACHE_UPDATE"] = "IKVCacheUpdateLayer"
        name = classes.get(kind) or f"I{''.join(word.capitalize() for word in kind.split('_'))}Layer"
        layer.__class__ = getattr(self.trt, name)
        return kind.lower(), layer

    def _dtype(self, tensor) -> torch.dtype | None:
        return torch.uint8 if tensor.dtype == self.trt.int4 else self.api.torch_dtypes[tensor.dtype]

    def _check(self, tensor, value: Tensor) -> None:
        """Assert that the value has the shape and type that the network declares for the tensor."""
        shape = tuple(tensor.shape)
        assert len(shape) == value.ndim, (tensor.name, shape, value.shape)
        if tensor.dtype != self.trt.int4:
            assert all(want in (-1, have) for want, have in zip(shape, value.shape, strict=True)), (tensor.name, shape)
        assert value.dtype == self._dtype(tensor), (tensor.name, value.dtype, tensor.dtype)

    def constant(self, layer):
        value, shape = self.constants[layer.name], tuple(layer.shape)
        if layer.get_output(0).dtype == self.trt.int4:
            shape = (*shape[:-1], shape[-1] // 2)
        return value.view(shape)

    def cast(self, layer, x):
        return x

    def shape(self, layer, x):
        return torch.tensor(x.shape, dtype=torch.int64)

    def shuffle(self, layer, x):
        x = x.permute(self._order(layer.first_transpose, x.ndim))
        if layer.reshape_dims is not None:
            x = x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(layer.reshape_dims)])
        return x.permute(self._order(layer.second_transpose, x.ndim))

    def _order(self, permutation, rank: int) -> list[int]:
        return list(permutation)[:rank]

    def gather(self, layer, x, indices):
        assert layer.mode == self.trt.GatherMode.DEFAULT and layer.num_elementwise_dims == 0
        assert int(indices.min()) >= 0 and int(indices.max()) < x.shape[layer.axis], "gather reads beyond its input"
        shape = (*x.shape[: layer.axis], *indices.shape, *x.shape[layer.axis + 1 :])
        return x.index_select(layer.axis, indices.flatten().long()).reshape(shape)

    def concatenation(self, layer, *tensors):
        return torch.cat(tensors, layer.axis)

    def slice(self, layer, x, start, size, *rest):
        assert tuple(layer.start) == (0,) * x.ndim and set(layer.stride) == {1} and not rest
        return x[tuple(slice(0, count) for count in size.tolist())]

    def elementwise(self, layer, a, b):
        assert a.dtype == b.dtype and a.ndim == b.ndim, (layer.name, a.dtype, b.dtype, a.shape, b.shape)
        operations = {
            "SUM": torch.add,
            "SUB": torch.sub,
            "PROD": torch.mul,
            "DIV": torch.div,
            "MAX": torch.maximum,
            "GREATER": torch.gt,
        }
        return operations[layer.op.name](*(each.float() if each.is_floating_point() else each for each in (a, b)))

    def unary(self, layer, x):
        return getattr(torch, layer.op.name.lower())(x.float())  # ABS, CEIL, EXP, LOG, SQRT

    def activation(self, layer, x):
        assert trt_name(layer, self.trt) == "SIGMOID"
        return x.float().sigmoid()

    def reduce(self, layer, x):
        assert layer.keep_dims
        axes = [axis for axis in range(x.ndim) if layer.axes >> axis & 1]
        return {"AVG": torch.mean, "MAX": torch.amax, "SUM": torch.sum}[layer.op.name](x.float(), axes, keepdim=True)

    def select(self, layer, condition, a, b):
        assert condition.dtype == torch.bool
        return torch.where(condition, a, b)

    def matrix_multiply(self, layer, a, b):
        assert a.dtype == b.dtype and a.ndim == b.ndim
        a, b = (self._operand(each, op) for each, op in ((a, layer.op0), (b, layer.op1)))
        return a @ b

    def _operand(self, x, operation):
        assert operation != self.trt.MatrixOperation.VECTOR
        return x.float().mT if operation == self.trt.MatrixOperation.TRANSPOSE else x.float()

    def quantize(self, layer, x, scale):
        dtype = self._dtype(layer.get_output(0))
        assert scale.numel() == 1
        scaled = (x.float() / scale.float()).clamp(*LIMITS[dtype])
        return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)

    def dequantize(self, layer, x, scale):
        scale = scale.float()
        if layer.get_input(0).dtype == self.trt.int4:
            q = unpack_int4(x).float()  # scale: [..., blocks]
            return (q.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
        if scale.ndim == 1:
            assert scale.numel() == x.shape[layer.axis]
            scale = scale.view([-1 if axis == layer.axis else 1 for axis in range(x.ndim)])
        return x.float() * scale

    def rotary_embedding(self, layer, x, cos, sin, positions):
        assert not layer.interleaved and layer.rotary_embedding_dim in (0, x.shape[-1]) and x.dtype == cos.dtype
        assert int(positions.max()) < cos.shape[0], "position beyond the table"
        cos, sin = (each.float()[positions.long()][:, None] for each in (cos, sin))  # [batch, 1, new, head_dim / 2]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    def kv_cache_update(self, layer, cache, new, write_index):
        assert layer.cache_mode == self.trt.KVCacheMode.LINEAR
        assert layer.get_input(0).is_network_input and layer.get_output(0).is_network_output
        for row, start in enumerate(write_index.tolist()):
            assert start + new.shape[2] <= cache.shape[2], "KV cache update beyond the capacity"
            cache[row, :, start : start + new.shape[2]] = new[row]
        return cache

    def attention_input(self, layer, *tensors):
        return tensors

    def attention_output(self, layer, tensors):
        attention = layer.attention
        assert attention.norm_op == self.trt.AttentionNormalizationOp.SOFTMAX
        assert attention.causal_kind == self.trt.CausalMaskKind.NONE
        q, k, v, mask, *rest = tensors
        assert not any(each is not None for each in rest) and mask.dtype == q.dtype == k.dtype == v.dtype
        scores = q.float() @ k.float().mT + mask.float()
        return scores.softmax(-1) @ v.float()

    def dist_collective(self, layer, x):
        operation = json.loads(layer.metadata)
        assert operation["ranks"] == self.comm.world_size == layer.num_ranks
        match operation["kind"], operation["reduction"]:
            case "ALL_REDUCE", "SUM":
                return self.comm.all_reduce(x)
            case "ALL_REDUCE", "MAX":
                return self.comm.all_reduce_max(x)
            case "ALL_GATHER", "NONE":
                return torch.cat(self.comm.gather_objects(x), 0)
        raise AssertionError(operation)


def trt_name(layer, trt) -> str:
    """An activation's name: the attribute `type` of its own class hides the layer's type."""
    return trt.IActivationLayer.type.fget(layer).name
