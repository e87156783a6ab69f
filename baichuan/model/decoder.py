"""The only definition of the Baichuan decoder.  ops.py specifies each op; the executors implement them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baichuan.config import ModelConfig
from baichuan.model.ops import Ops
from baichuan.records import AttentionSpec, LayerWeights, ModelWeights, Step


def decoder_layer(ops: Ops, x, residual, layer: LayerWeights, cache: Any, spec: AttentionSpec, step: Step, eps: float):
    """One layer: (x, residual) -> (x, residual), each [num_tokens, hidden_size].  x: an ops.Part"""
    qkv, residual = ops.norm_linear(x, residual, layer.input_norm, layer.qkv, eps)
    x = ops.partial_linear(ops.attention(qkv, cache, spec, step), layer.o_proj)
    return ops.gated_mlp(x, residual, layer.post_norm, layer.gate_up, layer.down_proj, eps)


def forward(
    ops: Ops, config: ModelConfig, weights: ModelWeights, caches: Sequence[Any], spec: AttentionSpec, step: Step
):
    """Logits of step.output_rows, [num_outputs, vocab_size] float32.  caches: one per layer."""
    x, residual = ops.embedding(step.tokens, weights.embedding), None
    for layer, cache in zip(weights.layers, caches, strict=True):
        x, residual = decoder_layer(ops, x, residual, layer, cache, spec, step, config.rms_norm_eps)
    rows, vocab_size, eps = step.output_rows, config.vocab_size, config.rms_norm_eps
    return ops.norm_head(x, residual, weights.norm, weights.lm_head, rows, vocab_size, eps)


def attention_spec(config: ModelConfig, rank: int, tp_size: int) -> AttentionSpec:
    """Rank `rank`'s share of the heads."""
    num_heads = config.num_heads // tp_size
    return AttentionSpec(
        num_heads,
        rank * num_heads,
        config.num_heads,
        config.head_dim,
        config.version.rotary,
        config.rope_theta,
        config.rope_factor,
    )
