"""Engine tensors that need calibration: SmoothQuant, FP8, the scales of an 8-bit KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig
from baichuan.quant.scaled import LIMITS, quantise
from baichuan.weights.binary.folder import BinaryFolder
from baichuan.weights.binary.fp8_scales import MODULES, LayerScales
from baichuan.weights.rank_tensors import PlannedTensors, as_stored, plan_hub, plan_model, plan_rows, whole
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint, TensorSource, known, part

E4M3 = torch.float8_e4m3fn


def plan_binary(folder: BinaryFolder, quant: QuantConfig, rank: int) -> list[PlannedTensors]:
    """Rank `rank`'s engine tensors from a binary folder.

    Weight-only and FP8 quantisation read whole rows, from every rank's files, so that nothing depends on tp_size;
    everything else reads this rank's files.  Raises CheckpointError where the folder lacks something.
    """
    tp_size, config = folder.layout.tp_size, folder.model
    rank_alone = quant.weights in ("none", "smooth_quant")
    folder.check(quant, range(rank, rank + 1) if rank_alone else range(tp_size))
    if quant.weights == "fp8":
        return plan_fp8(folder.checkpoint(), config, quant, folder.fp8_scales(), rank, tp_size)
    if not rank_alone:
        plan = plan_hub(folder.checkpoint(), config, quant, rank, tp_size)
    else:
        plan = plan_model(folder.checkpoint(), config, quant, rank, tp_size, _rank_linears(folder, quant, rank))
    if quant.kv_cache == "none":
        return plan
    return [*plan, *_plan_kv_scales(config, lambda layer: folder.kv_scales(layer, quant.kv_cache))]


def plan_fp8(
    checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig, scales: list[LayerScales], rank: int, tp_size: int
) -> list[PlannedTensors]:
    """Rank `rank`'s engine tensors with e4m3 weights and activations, or only an FP8 KV cache.

    scales: one entry a layer.  Each module (q, k, v, gate, up, ...) has one scale for its weights.
    """

    def plan_linear(layer: int, name: str) -> list[PlannedTensors]:
        linear, modules = LINEARS[name], MODULES[name]
        sources = [checkpoint[f"model.layers.{layer}.{source}.weight"] for source in linear.sources]
        rows = sources[0].shape[0] // linear.parts
        blocks = [part(source, index * rows, rows) for source in sources for index in range(linear.parts)]
        pieces, channel_scales = [], []
        for block, module in zip(blocks, modules, strict=True):
            scale = scales[layer].weights[module]
            ranges, columns = replace(linear, parts=1).cut(block.shape, rank, tp_size)
            pieces.append((_as_e4m3(block, scale), ranges))
            channel_scales.append(torch.full((sum(stop - start for start, stop in ranges),), scale))
        prefix = f"layers.{layer}.{name}"
        return [
            plan_rows(prefix, pieces, as_stored(E4M3, "weight"), columns),
            _plan_known(f"{prefix}.scale", torch.cat(channel_scales)),
            _plan_known(f"{prefix}.input_scale", torch.tensor([scales[layer].input_scale(name)])),
        ]

    if quant.weights == "fp8":
        plan = plan_model(checkpoint, config, quant, rank, tp_size, plan_linear)
    else:
        plan = plan_hub(checkpoint, config, quant, rank, tp_size)
    if quant.kv_cache == "none":
        return plan
    ratio = LIMITS[E4M3] / LIMITS[torch.int8] if quant.kv_cache == "int8" else 1.0
    kv = [{name: known(torch.tensor([scale * ratio])) for name, scale in layer.kv.items()} for layer in scales]
    return [*plan, *_plan_kv_scales(config, kv.__getitem__)]


def _rank_linears(folder: BinaryFolder, quant: QuantConfig, rank: int) -> Callable[[int, str], list[PlannedTensors]]:
    dtype = getattr(torch, folder.model.dtype)

    def plan_linear(layer: int, name: str) -> list[PlannedTensors]:
        prefix = f"layers.{layer}.{name}"
        if quant.weights == "none":
            return [plan_rows(prefix, [whole(folder.dense(layer, name, rank))], as_stored(dtype, "weight"))]
        fields = folder.smooth_quant(layer, name, rank, quant.per_token, quant.per_channel)
        return [_plan_source(f"{prefix}.{field}", source) for field, source in fields.items()]

    return plan_linear


def _plan_kv_scales(config: ModelConfig, scales: Callable[[int], dict[str, TensorSource]]) -> list[PlannedTensors]:
    return [
        _plan_source(f"layers.{layer}.{name}", source)
        for layer in range(config.num_layers)
        for name, source in scales(layer).items()
    ]


def _as_e4m3(source: TensorSource, scale: float) -> TensorSource:
    factor = torch.tensor(scale)
    return replace(source, dtype=E4M3, read=lambda start, stop: quantise(source.read(start, stop), factor, E4M3))


def _plan_source(name: str, source: TensorSource) -> PlannedTensors:
    return plan_rows(name, [whole(source)], as_stored(source.dtype, ""))


def _plan_known(name: str, values: Tensor) -> PlannedTensors:
    return _plan_source(name, known(values))
