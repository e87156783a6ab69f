"""What an engine's tensors must be: of the model's shapes and types, so that nobody reads beyond one, and finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.errors import EngineError
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, ModelWeights, SmoothQuantWeight, Weight
from baichuan.weights.shard import LINEARS, hub_shapes, padded_vocab_size

Spec = tuple[torch.dtype, tuple[int, ...]]
F32, I8 = torch.float32, torch.int8


def require_shapes(weights: ModelWeights, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int) -> None:
    """Raise EngineError for a tensor of another shape or type than this rank of the engine has."""
    for name, tensor, (dtype, shape) in _tensors(weights, config, quant, rank, tp_size):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found, expected = (str(each).removeprefix("torch.") for each in (tensor.dtype, dtype))
            raise EngineError(
                f"the engine's {name} is {found} {list(tensor.shape)[:8]} and must be {expected} {list(shape)}; build "
                "it again"
            )


def require_finite(weights: ModelWeights, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int) -> None:
    """Raise EngineError for a NaN or an infinity; reads every number.  After require_shapes."""
    for name, tensor, (dtype, _) in _tensors(weights, config, quant, rank, tp_size):
        if dtype == torch.float8_e4m3fn:
            right = int((tensor.view(torch.uint8) & 0x7F).max()) < 0x7F  # 0x7F and 0xFF are its NaNs
        else:
            low, high = tensor.aminmax()  # several times as fast as isfinite; a NaN is the result of both
            right = math.isfinite(low) and math.isfinite(high)
        if not right:
            raise EngineError(f"the engine's {name} holds a NaN or an infinity; build it again from a whole checkpoint")


def _tensors(
    weights: ModelWeights, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor, Spec]]:
    """(name, tensor, what it must be) of every tensor."""
    dtype, hidden = getattr(torch, config.dtype), config.hidden_size
    shares = _linear_shapes(config, quant, rank, tp_size)
    norm = (dtype, (hidden,))
    yield "embedding", weights.embedding, (dtype, (config.vocab_size, hidden))
    yield "norm", weights.norm, norm
    head = padded_vocab_size(config.vocab_size, tp_size) // tp_size
    yield from _weight("lm_head", weights.lm_head, head, hidden, dtype, quant)
    for number, layer in enumerate(weights.layers):
        prefix = f"layers.{number}"
        yield f"{prefix}.input_norm", layer.input_norm, norm
        yield f"{prefix}.post_norm", layer.post_norm, norm
        for name, scale in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale)):
            if scale is not None:
                yield f"{prefix}.{name}", scale, (F32, (1,))
        for name, share in shares.items():
            yield from _weight(f"{prefix}.{name}", getattr(layer, name), *share, dtype, quant)


def _linear_shapes(config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int) -> dict[str, tuple[int, int]]:
    """The rank's (rows, columns) of each of shard.LINEARS; where scales are of groups, the ranks' may differ."""
    hub, shares = hub_shapes(config), {}
    for name, linear in LINEARS.items():
        shapes = [hub[f"model.layers.0.{module}.weight"] for module in linear.modules]
        cuts = [linear.cut(shape, rank, tp_size, quant.group_size) for shape in shapes]
        rows = sum(stop - start for ranges, _ in cuts for start, stop in ranges)
        start, stop = cuts[0][1]
        shares[name] = (rows, stop - start)
    return shares


def _weight(
    name: str, weight: Weight, rows: int, columns: int, dtype: torch.dtype, quant: QuantConfig
) -> Iterator[tuple[str, Tensor, Spec]]:
    specs = weight_specs(type(weight), rows, columns, dtype, quant.group_size)
    for field in dataclasses.fields(weight):
        if (tensor := getattr(weight, field.name)) is not None:
            yield f"{name}.{field.name}", tensor, specs[field.name]


def weight_specs(kind: type, rows: int, columns: int, dtype: torch.dtype, group_size: int) -> dict[str, Spec]:
    """Every field of a weight record for a matrix of rows x columns; group_size 0: one group for the whole row."""
    scale, one = (F32, (rows,)), (F32, (1,))
    groups = (rows, columns // group_size if group_size else 1)
    if kind is DenseWeight:
        return {"weight": (dtype, (rows, columns))}
    if kind is Int8Weight:
        return {"weight": (I8, (rows, columns)), "scale": scale}
    if kind is Int4Weight:
        return {"packed": (torch.uint8, (rows, columns // 2)), "scale": (dtype, groups), "zero": (I8, groups)}
    if kind is SmoothQuantWeight:
        return {"weight": (I8, (rows, columns)), "scale": scale, "input_scale": one, "smoother": (F32, (columns,))}
    if kind is Fp8Weight:
        return {"weight": (torch.float8_e4m3fn, (rows, columns)), "scale": scale, "input_scale": one}
    raise AssertionError(f"{kind.__name__} has no specification")
