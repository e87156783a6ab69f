"""The Baichuan decoder, the only definition of it.  What an op does is ops.py's business; how, an executor's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baichuan.config import ModelConfig
from baichuan.model.ops import Ops
from baichuan.records import AttentionSpec, LayerWeights, ModelWeights, Step


def decoder_layer(ops: Ops, x, residual, layer: LayerWeights, cache: Any, spec: AttentionSpec, step: Step, eps: float):
    """One layer.  x is what the layer before adds to residual, both [num_tokens, hidden_size]."""
    x, residual = ops.add_rms_norm(x, residual, layer.input_norm, eps)
    x = ops.attention(ops.linear(x, layer.qkv), cache, spec, step)
    x = ops.all_reduce(ops.linear(x, layer.o_proj))
    x, residual = ops.add_rms_norm(x, residual, layer.post_norm, eps)
    x = ops.silu_mul(ops.linear(x, layer.gate_up))
    x = ops.all_reduce(ops.linear(x, layer.down_proj))
    return x, residual


def forward(
    ops: Ops, config: ModelConfig, weights: ModelWeights, caches: Sequence[Any], spec: AttentionSpec, step: Step
):
    """Logits of step.output_rows, [num_outputs, vocab_size] float32.  caches: one entry a layer."""
    x, residual = ops.embedding(step.tokens, weights.embedding), None
    for layer, cache in zip(weights.layers, caches, strict=True):
        x, residual = decoder_layer(ops, x, residual, layer, cache, spec, step, config.rms_norm_eps)
    x, _ = ops.add_rms_norm(x, residual, weights.norm, config.rms_norm_eps)
    return ops.head(ops.select_rows(x, step.output_rows), weights.lm_head, config.vocab_size)


def attention_spec(config: ModelConfig, rank: int, tp_size: int) -> AttentionSpec:
    """Rank `rank`'s share of the heads."""
    num_heads = config.num_heads // tp_size
    return AttentionSpec(num_heads, rank * num_heads, config.num_heads, config.head_dim, config.version.rotary)
