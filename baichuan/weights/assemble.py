"""From the flat, named tensors of an engine file to weight records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.errors import EngineError
from baichuan.records import LayerWeights, ModelWeights, Weight
from baichuan.weights.shard import LINEARS
from baichuan.weights.types import TYPES


def assemble(tensors: Mapping[str, Tensor], config: ModelConfig, quant: QuantConfig) -> ModelWeights:
    """One rank's weights from tensors by engine name: layers.0.qkv.weight, layers.0.k_scale, ..., lm_head.weight.

    Raises EngineError for a missing or a left-over tensor.
    """
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise EngineError(f"the engine has no tensor {name}; build it again")
        return left.pop(name)

    def weight(name: str, kind: type) -> Weight:
        fields = {}
        for field in dataclasses.fields(kind):
            key, optional = f"{name}.{field.name}", field.default is not dataclasses.MISSING
            fields[field.name] = left.pop(key, field.default) if optional else take(key)
        return kind(**fields)

    def layer(prefix: str) -> LayerWeights:
        return LayerWeights(
            input_norm=take(f"{prefix}.input_norm"),
            post_norm=take(f"{prefix}.post_norm"),
            k_scale=None if quant.kv_cache == "none" else take(f"{prefix}.k_scale"),
            v_scale=None if quant.kv_cache == "none" else take(f"{prefix}.v_scale"),
            **{name: weight(f"{prefix}.{name}", TYPES[quant.weights].record) for name in LINEARS},
        )

    weights = ModelWeights(
        embedding=take("embedding"),
        layers=tuple(layer(f"layers.{index}") for index in range(config.num_layers)),
        norm=take("norm"),
        lm_head=weight("lm_head", TYPES[quant.weights if quant.quantize_lm_head else "none"].record),
    )
    if left:
        raise EngineError(f"the engine has a tensor {min(left)} that this model does not use; build it again")
    return weights
