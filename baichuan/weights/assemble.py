"""Between records and the flat, named tensors of an engine file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.errors import EngineError
from baichuan.records import (
    DenseWeight,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    LayerWeights,
    ModelWeights,
    SmoothQuantWeight,
    Weight,
)
from baichuan.weights.shard import LINEARS

WEIGHT_TYPES = {
    "none": DenseWeight,
    "int8": Int8Weight,
    "int4": Int4Weight,
    "smooth_quant": SmoothQuantWeight,
    "fp8": Fp8Weight,
}


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
        optional = {field.name for field in dataclasses.fields(kind) if "None" in field.type}
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{n: left.pop(f"{name}.{n}", None) if n in optional else take(f"{name}.{n}") for n in names})

    def layer(prefix: str) -> LayerWeights:
        return LayerWeights(
            input_norm=take(f"{prefix}.input_norm"),
            post_norm=take(f"{prefix}.post_norm"),
            k_scale=None if quant.kv_cache == "none" else take(f"{prefix}.k_scale"),
            v_scale=None if quant.kv_cache == "none" else take(f"{prefix}.v_scale"),
            **{name: weight(f"{prefix}.{name}", WEIGHT_TYPES[quant.weights]) for name in LINEARS},
        )

    weights = ModelWeights(
        embedding=take("embedding"),
        layers=tuple(layer(f"layers.{index}") for index in range(config.num_layers)),
        norm=take("norm"),
        lm_head=weight("lm_head", WEIGHT_TYPES[quant.weights if quant.quantize_lm_head else "none"]),
    )
    if left:
        raise EngineError(f"the engine has a tensor {min(left)} that this model does not use; build it again")
    return weights
