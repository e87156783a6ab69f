"""Engine tensors that need calibration: SmoothQuant, FP8, calibrated integers, the scales of an 8-bit KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from baichuan.config import ModelConfig, QuantConfig, WeightOnly
from baichuan.quant.scaled import LIMITS
from baichuan.weights.binary.folder import BinaryFolder
from baichuan.weights.binary.fp8_scales import MODULES, LayerScales
from baichuan.weights.converters import cast, fp8, fp8_per_tensor
from baichuan.weights.rank_tensors import (
    LinearConverters,
    LinearTensors,
    Piece,
    TensorBlocks,
    as_stored,
    from_checkpoint,
    from_pieces,
    integer_tensors,
    whole_model,
)
from baichuan.weights.shard import LINEARS
from baichuan.weights.smoothing import from_strengths
from baichuan.weights.source import Checkpoint, TensorSource, known
from baichuan.weights.types import needs_calibration


def from_binary(folder: BinaryFolder, quant: QuantConfig, rank: int) -> list[TensorBlocks]:
    """Rank `rank`'s engine tensors from a binary folder.

    Weight-only, FP8 and `-sq auto` read whole rows, from every rank's files, so that nothing depends on tp_size;
    everything else reads this rank's files.  Raises CheckpointError where the folder lacks something.
    """
    tp_size, config = folder.layout.tp_size, folder.model
    form = folder.calibrated(quant)
    smooth = quant.weights == "smooth_quant"
    rank_alone = quant.weights == "none" or (smooth and not folder.by_mode)
    folder.check(quant, range(rank, rank + 1) if rank_alone else range(tp_size))
    if quant.weights == "fp8" and needs_calibration(quant):
        return from_fp8_scales(folder.checkpoint(), config, quant, folder.fp8_scales(), rank, tp_size)
    if form:
        linears = _calibrated_linears(folder, quant, form, rank)
        tensors = whole_model(folder.checkpoint(), config, quant, rank, tp_size, linears)
    elif smooth and folder.by_mode:
        tensors = from_strengths(folder, quant, rank)
    elif not rank_alone:
        tensors = from_checkpoint(folder.checkpoint(), config, quant, rank, tp_size)
    else:
        tensors = whole_model(folder.checkpoint(), config, quant, rank, tp_size, _rank_linears(folder, quant, rank))
    if quant.kv_cache == "none":
        return tensors
    return [*tensors, *_kv_scales(config, lambda layer: folder.kv_scales(layer, quant.kv_cache))]


def from_fp8_scales(
    checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig, scales: list[LayerScales], rank: int, tp_size: int
) -> list[TensorBlocks]:
    """Rank `rank`'s engine tensors with e4m3 weights and activations, or only an FP8 KV cache.

    scales: one entry per layer, with one weight scale per projection (q, k, v, gate, up, ...); of them those are used
    that quant.per_token and quant.per_channel leave.
    """

    by_channel = fp8(quant, getattr(torch, config.dtype))

    def converters(layer: int, name: str) -> LinearConverters:
        of_layer = scales[layer]
        projections = [
            by_channel if quant.per_channel else fp8_per_tensor(of_layer.weights[module]) for module in MODULES[name]
        ]
        constants = {} if quant.per_token else {"input_scale": torch.tensor([of_layer.input_scale(name)])}
        return LinearConverters(projections, constants)

    tensors = from_checkpoint(checkpoint, config, quant, rank, tp_size, converters if quant.weights == "fp8" else None)
    if quant.kv_cache == "none":
        return tensors
    ratio = LIMITS[torch.float8_e4m3fn] / LIMITS[torch.int8] if quant.kv_cache == "int8" else 1.0
    kv = [{name: known(torch.tensor([scale * ratio])) for name, scale in layer.kv.items()} for layer in scales]
    return [*tensors, *_kv_scales(config, kv.__getitem__)]


def _calibrated_linears(folder: BinaryFolder, quant: QuantConfig, form: WeightOnly, rank: int) -> LinearTensors:
    """A rank's rows and columns of the integers that calibration found."""

    def linear_tensors(layer: int, name: str) -> list[TensorBlocks]:
        matrices = [folder.integers(layer, module, form) for module in LINEARS[name].modules]
        return integer_tensors(layer, name, matrices, folder.model, quant, rank, folder.layout.tp_size)

    return linear_tensors


def _rank_linears(folder: BinaryFolder, quant: QuantConfig, rank: int) -> LinearTensors:
    """A rank's linears from the rank's own files."""
    plain = cast(getattr(torch, folder.model.dtype))

    def linear_tensors(layer: int, name: str) -> list[TensorBlocks]:
        prefix = f"layers.{layer}.{name}"
        if quant.weights == "none":
            source = folder.dense(layer, name, rank)
            return [from_pieces(prefix, [Piece(source, (0, source.shape[0]), plain)])]
        fields = folder.smooth_quant(layer, name, rank, quant.per_token, quant.per_channel)
        return [as_stored(f"{prefix}.{field}", source) for field, source in fields.items()]

    return linear_tensors


def _kv_scales(config: ModelConfig, scales: Callable[[int], Mapping[str, TensorSource]]) -> list[TensorBlocks]:
    return [
        as_stored(f"layers.{layer}.{name}", source)
        for layer in range(config.num_layers)
        for name, source in scales(layer).items()
    ]
