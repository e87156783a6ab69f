"""The model as a TensorRT network: TensorRtOps implements ops.Ops, and decoder.forward calls it.

Sequences are padded on the right: x is [batch, new, features].  Padding is computed and never read: its keys lie at
or beyond the end of its sequence, where the mask hides them until real ones have replaced them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from baichuan.config import BuildConfig, ModelConfig, QuantConfig
from baichuan.executors.tensorrt.contract import Contract, TensorSpec, make_contract
from baichuan.executors.tensorrt.linear import linear
from baichuan.executors.tensorrt.network import Graph
from baichuan.model import position
from baichuan.model.decoder import attention_spec, forward
from baichuan.model.ops import ComposedOps
from baichuan.records import AttentionSpec, LayerWeights, ModelWeights, Step, Weight

MASKED = {torch.float16: -1e4, torch.bfloat16: -1e9, torch.float32: -1e9}  # finite: half precision has no -1e9


@dataclass(frozen=True)
class LayerTensors:
    """One layer's KV cache among the network's inputs and outputs."""

    past_k: Any
    past_v: Any
    present_k: str  # the output's name
    present_v: str
    k_scale: Tensor | None  # see records.LayerWeights
    v_scale: Tensor | None


class TensorRtOps(ComposedOps):
    """ops.Ops on the tensors of a network."""

    def __init__(self, graph: Graph, inputs: dict[str, Any], build: BuildConfig):
        self.graph, self.inputs, self.build = graph, inputs, build
        self.ranks, self.capacity = build.world_size, build.max_seq_len
        self.mask = None  # made by the first layer, shared by all
        self.tables: tuple[Any, Any] | None = None  # cos and sin
        self.residuals: list[Any] = []  # the residual of every norm, in order

    def embedding(self, tokens, weight):
        return self.graph.gather(self.graph.constant(weight), tokens)

    def add_rms_norm(self, x, residual, weight, eps):
        g = self.graph
        residual = x if residual is None else g.binary("SUM", x, residual)
        self.residuals.append(residual)
        r = g.cast(residual, torch.float32)
        mean = g.reduce("AVG", g.binary("PROD", r, r))
        root = g.unary("SQRT", g.binary("SUM", mean, g.scalar(eps, mean)))
        normed = g.cast(g.binary("DIV", r, root), g.torch_dtype(x))
        return g.binary("PROD", normed, g.constant(weight, shape=(1, 1, weight.shape[0]))), residual

    def linear(self, x, weight: Weight):
        return linear(self.graph, x, weight, self.ranks)

    def attention(self, qkv, cache: LayerTensors, spec: AttentionSpec, step: Step):
        g, dtype = self.graph, self.graph.torch_dtype(qkv)
        qkv = g.reshape(qkv, (0, 0, 3, spec.num_heads, spec.head_dim), (2, 0, 3, 1, 4))
        q, k, v = (g.take(qkv, part, axis=0) for part in range(3))  # each [batch, heads, new, head_dim]
        q = g.cast(q, torch.float32)
        if spec.rotary:
            k, (cos, sin) = g.cast(k, torch.float32), self._rope(spec)
            q, k = (g.rotary(each, cos, sin, step.positions, spec.head_dim) for each in (q, k))
        q = g.binary("PROD", q, g.scalar(spec.head_dim**-0.5, q))
        q, k = g.cast(q, dtype), g.cast(k, dtype)
        update = self._update_in_place if cache.k_scale is None else self._grow
        keys = update(k, cache.past_k, cache.present_k, cache.k_scale)  # [batch, heads, total, head_dim]
        values = update(v, cache.past_v, cache.present_v, cache.v_scale)
        if self.mask is None:
            self.mask = g.cast(self._mask(step.positions, spec, MASKED[dtype]), dtype)
        fused = self.build.gpt_attention_plugin and dtype != torch.float32  # float32 has no fused kernel over prompts
        out = g.attention(q, keys, values, self.mask, decomposable=not fused)
        return g.reshape(g.permute(out, (0, 2, 1, 3)), (0, 0, -1))

    def silu_mul(self, gate_up):
        g, half = self.graph, gate_up.shape[-1] // 2
        pair = g.reshape(gate_up, (0, 0, 2, half))
        gate, up = (g.cast(g.take(pair, part, axis=2), torch.float32) for part in range(2))
        product = g.binary("PROD", g.binary("PROD", gate, g.sigmoid(gate)), up)
        return g.cast(product, g.torch_dtype(gate_up))

    def all_reduce(self, x):
        return x if self.ranks == 1 else self.graph.all_reduce(x, "SUM", self.ranks)

    def select_rows(self, x, rows):
        return self.graph.gather(self.graph.reshape(x, (-1, x.shape[-1])), rows)

    def head(self, x, weight: Weight, vocab_size: int):
        """As ops.Ops says, but rounded to the dtype: TensorRT's products have the type of their factors."""
        g = self.graph
        logits = linear(g, x, weight, self.ranks)  # [outputs, padded vocabulary / ranks]
        share = logits.shape[-1]
        if self.ranks > 1:
            gathered = g.all_gather(logits, self.ranks)  # [ranks * outputs, share]
            logits = g.reshape(g.reshape(gathered, (self.ranks, -1, share), (1, 0, 2)), (-1, self.ranks * share))
        if self.ranks * share > vocab_size:
            logits = g.first_columns(logits, vocab_size)
        return g.cast(logits, torch.float32)

    def _rope(self, spec: AttentionSpec):
        if self.tables is None:
            cos, sin = position.rope_table(self.capacity, spec)
            self.tables = self.graph.constant(cos), self.graph.constant(sin)
        return self.tables

    def _update_in_place(self, new, past, present: str, _):
        whole = self.graph.cache_update(past, new, self.inputs["write_index"])
        self.graph.output(whole, present)
        return whole

    def _grow(self, new, past, present: str, scale):
        """past: [past slots, batch, heads, head_dim] in 8 bits, to which the runtime appends the output."""
        g = self.graph
        new8 = g.quantize(g.permute(g.cast(new, torch.float32), (2, 0, 1, 3)), scale, g.torch_dtype(past))
        whole = g.dequantize(g.concat([past, new8], axis=0), scale, g.torch_dtype(new))
        g.output(new8, present)
        return g.permute(whole, (1, 2, 0, 3))

    def _mask(self, positions, spec: AttentionSpec, masked: float):
        """0, or ALiBi's slope * (key position - query position); a large negative where the key comes later.

        -> [batch, heads or 1, new, total] float32
        """
        g = self.graph
        if "key_positions" in self.inputs:
            keys = g.reshape(self.inputs["key_positions"], (0, 1, 1, -1))
        else:
            keys = g.constant(torch.arange(self.capacity, dtype=torch.int32), shape=(1, 1, 1, self.capacity))
        distance = g.binary("SUB", keys, g.reshape(positions, (0, 1, -1, 1)))
        later = g.binary("GREATER", distance, g.scalar(0, distance))
        if spec.rotary:
            seen, hidden = (g.constant(torch.full((1, 1, 1, 1), value)) for value in (0.0, masked))
            return g.select(later, hidden, seen)
        slopes = position.alibi_slopes(spec.total_heads)[spec.first_head :][: spec.num_heads]
        bias = g.binary("PROD", g.cast(distance, torch.float32), g.constant(slopes, shape=(1, spec.num_heads, 1, 1)))
        return g.select(later, g.scalar(masked, bias), bias)


def lower(
    graph: Graph, config: ModelConfig, quant: QuantConfig, build: BuildConfig, weights: ModelWeights, rank: int
) -> tuple[Contract, TensorRtOps]:
    """Write rank `rank`'s network into graph."""
    spec = attention_spec(config, rank, build.world_size)
    contract = make_contract(config, quant, build, graph.api.name, graph.api.version)
    inputs = {each.name: graph.input(each.name, each.torch_dtype, _dims(each)) for each in contract.inputs}
    ops = TensorRtOps(graph, inputs, build)
    caches = [_layer_tensors(graph, inputs, index, layer) for index, layer in enumerate(weights.layers)]
    nothing: dict[str, Any] = dict(
        cu_seqlens=None, context_lengths=None, max_new_tokens=0, max_context_length=0
    )  # padded, not packed
    step = Step(inputs["input_ids"], inputs["positions"], output_rows=inputs["output_rows"], **nothing)
    logits = forward(ops, config, weights, caches, spec, step)
    graph.output(graph.cast(logits, getattr(torch, build.logits_dtype)), "logits")
    return contract, ops


def weight_names(weights: ModelWeights) -> dict[Tensor, str]:
    """Each tensor's name, as in an engine file."""
    names: dict[Tensor, str] = {}

    def visit(value, name: str) -> None:
        if isinstance(value, Tensor):
            names[value] = name
        elif isinstance(value, tuple):
            for index, each in enumerate(value):
                visit(each, f"{name}.{index}")
        elif value is not None:
            for field in fields(value):
                visit(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)

    visit(weights, "")
    return names


def _dims(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if isinstance(each, str) else each for each in spec.shape)


def _layer_tensors(graph: Graph, inputs: dict[str, Any], index: int, layer: LayerWeights) -> LayerTensors:
    names = f"k.{index}", f"v.{index}"
    past_k, past_v = (inputs[f"past_{name}"] for name in names)
    present_k, present_v = (f"present_{name}" for name in names)
    return LayerTensors(past_k, past_v, present_k, present_v, layer.k_scale, layer.v_scale)
