"""The trace executor: what the model asks for, with shapes, and nothing computed.

Weights and results are tensors of the device "meta", which have a shape and a type and no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.model.decoder import attention_spec, forward
from baichuan.model.ops import ComposedOps
from baichuan.records import AttentionSpec, Step, Weight
from baichuan.weights.assemble import assemble
from baichuan.weights.rank_tensors import TensorBlocks


@dataclass
class TraceOps(ComposedOps):
    """ops.Ops that writes down each op as `name(arguments) -> shape`."""

    tp_size: int
    calls: list[str] = field(default_factory=list)

    def embedding(self, tokens, weight):
        return self._call("embedding", (tokens.shape[0], weight.shape[1]), weight.dtype)

    def add_rms_norm(self, x, residual, weight, eps):
        result = self._call("add_rms_norm" if residual is not None else "rms_norm", x.shape, x.dtype)
        return result, result

    def linear(self, x, weight: Weight):
        out_features, in_features = weight.shape
        if x.shape[1] != in_features:
            raise ValueError(f"linear takes {in_features} features and got {x.shape[1]}")
        kind = type(weight).__name__.removesuffix("Weight")
        return self._call(f"linear {kind} {out_features}x{in_features}", (x.shape[0], out_features), x.dtype)

    def attention(self, qkv, cache, spec: AttentionSpec, step: Step):
        heads = f"heads {spec.first_head}-{spec.first_head + spec.num_heads - 1} of {spec.total_heads}"
        name = f"attention {'RoPE' if spec.rotary else 'ALiBi'} {heads}"
        return self._call(name, (qkv.shape[0], spec.num_heads * spec.head_dim), qkv.dtype)

    def silu_mul(self, gate_up):
        return self._call("silu_mul", (gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype)

    def all_reduce(self, x):
        return self._call("all_reduce", x.shape, x.dtype) if self.tp_size > 1 else x

    def select_rows(self, x, rows):
        return self._call("select_rows", (rows.shape[0], x.shape[1]), x.dtype)

    def head(self, x, weight: Weight, vocab_size: int):
        out_features, in_features = weight.shape
        name = f"head {type(weight).__name__.removesuffix('Weight')} {out_features}x{in_features}"
        return self._call(name, (x.shape[0], vocab_size), torch.float32)

    def _call(self, name: str, shape, dtype: torch.dtype) -> Tensor:
        self.calls.append(f"{name} -> {list(shape)} {str(dtype).removeprefix('torch.')}")
        return torch.empty(tuple(shape), dtype=dtype, device="meta")


def trace(
    config: ModelConfig, quant: QuantConfig, rank_tensors: list[TensorBlocks], rank: int, tp_size: int, step: Step
) -> list[str]:
    """The ops of one step on rank `rank`, in order."""
    specs = {name: spec for item in rank_tensors for name, spec in item.specs.items()}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in specs.items()}
    ops, spec = TraceOps(tp_size), attention_spec(config, rank, tp_size)
    forward(ops, config, assemble(tensors, config, quant), [None] * config.num_layers, spec, step)
    return ops.calls
