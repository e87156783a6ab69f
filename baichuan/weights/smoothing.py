"""SmoothQuant's engine tensors from weights as they are, smoothed and quantised for the mode that is asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.quant.smoothquant import Mode, Smoothing, quantise_smoothed
from baichuan.weights.binary.folder import BinaryFolder
from baichuan.weights.converters import Converter
from baichuan.weights.rank_tensors import LinearConverters, TensorBlocks, from_checkpoint
from baichuan.weights.shard import LINEARS, NORMS, hub_shapes
from baichuan.weights.source import TensorSource

ABSORBED = {"input_norm": "qkv", "post_norm": "gate_up"}  # by norm: the linear whose smoother divides its weight


def from_strengths(folder: BinaryFolder, quant: QuantConfig, rank: int) -> list[TensorBlocks]:
    """Rank `rank`'s engine tensors from a folder that `-sq auto` wrote; every rank count has the same integers."""
    config, tp_size, mode = folder.model, folder.layout.tp_size, Mode(quant.per_token, quant.per_channel)
    checkpoint = dict(folder.checkpoint())
    for layer in range(config.num_layers):
        for norm, linear in ABSORBED.items():
            name = f"model.layers.{layer}.{NORMS[norm]}.weight"
            checkpoint[name] = _divided(checkpoint[name], folder.smoothing(layer, linear, mode).smoother)

    def converters(layer: int, name: str) -> LinearConverters:
        smoothing = folder.smoothing(layer, name, mode)
        projections = [_converter(smoothing, None if mode.per_channel else each) for each in smoothing.weight_scales]
        constants = {} if mode.per_token else {"input_scale": smoothing.input_scale}
        if name not in ABSORBED.values():
            constants["smoother"] = _of_rank(smoothing.smoother, config, name, rank, tp_size)
        return LinearConverters(projections, constants)

    return from_checkpoint(checkpoint, config, quant, rank, tp_size, converters)


def _converter(smoothing: Smoothing, scale: Tensor | None) -> Converter:
    """Fields of records.SmoothQuantWeight that depend on the rows."""

    def convert(rows: Tensor) -> dict[str, Tensor]:
        of_all = None if scale is None else scale.to(rows.device)
        weight, scales = quantise_smoothed(rows, smoothing.smoother.to(rows.device), of_all)
        return {"weight": weight, "scale": scales}

    return convert


def _divided(norm: TensorSource, smoother: Tensor) -> TensorSource:
    """The norm whose output is smoothed."""
    return replace(norm, dtype=torch.float32, read=lambda a, b: norm.read(a, b).float() / smoother[a:b])


def _of_rank(smoother: Tensor, config: ModelConfig, name: str, rank: int, tp_size: int) -> Tensor:
    shape = hub_shapes(config)[f"model.layers.0.{LINEARS[name].modules[0]}.weight"]
    start, stop = LINEARS[name].cut(shape, rank, tp_size)[1]
    return smoother[start:stop]
