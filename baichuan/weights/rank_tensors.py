"""One rank's engine tensors as a plan: their names, types and shapes now, their rows when they are written.

The whole row is quantised first and the rank's columns are cut afterwards, so that every tensor-parallel size holds
the same integers and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig, QuantConfig
from baichuan.quant.weight_only import check_group_size, quantise_int4, quantise_int8
from baichuan.weights.shard import LINEARS, NORMS, Range, padded_vocab_size, rank_range
from baichuan.weights.source import Checkpoint, TensorSource

BLOCK_BYTES = 32 << 20  # of a weight's rows in float32: a build holds a few such blocks at a time
NORM_HEAD_EPS = 1e-12  # torch.nn.functional.normalize's default, as in the original NormHead

Converter = Callable[[Tensor], dict[str, Tensor]]  # whole rows [n, in_features] -> fields of a weight record


@dataclass(frozen=True)
class PlannedTensors:
    """Tensors that are made together, block of rows by block of rows."""

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by engine name
    blocks: Callable[[], Iterator[dict[str, Tensor]]]  # each tensor's next rows, until all are complete


def plan_hub(
    checkpoint: Checkpoint, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int
) -> list[PlannedTensors]:
    """Rank `rank`'s engine tensors from a checkpoint in the hub's format, quantised weight-only or not at all.

    Raises ConfigError when the model, or int4's groups of input channels, do not divide by tp_size.
    """
    dtype = getattr(torch, config.dtype)

    def plan_linear(index: int, name: str) -> list[PlannedTensors]:
        linear = LINEARS[name]
        sources = [checkpoint[f"model.layers.{index}.{source}.weight"] for source in linear.sources]
        rows, columns = linear.cut(sources[0].shape, rank, tp_size)
        if quant.weights == "int4":
            check_group_size(quant.group_size, columns[1] - columns[0], name)
        pieces = [(source, rows) for source in sources]
        return [plan_rows(f"layers.{index}.{name}", pieces, _converter(quant.weights, quant, dtype), columns)]

    return plan_model(checkpoint, config, quant, rank, tp_size, plan_linear)


def plan_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig,
    rank: int,
    tp_size: int,
    plan_linear: Callable[[int, str], list[PlannedTensors]],
) -> list[PlannedTensors]:
    """The whole model, of which plan_linear(layer, name) plans the layers' linears (shard.LINEARS)."""
    config.check_tensor_parallel(tp_size)
    plain = as_stored(getattr(torch, config.dtype), "")
    plan = [plan_rows("embedding", [whole(checkpoint["model.embed_tokens.weight"])], plain)]
    for index in range(config.num_layers):
        hub, layer = f"model.layers.{index}", f"layers.{index}"
        for name, source in NORMS.items():
            plan.append(plan_rows(f"{layer}.{name}", [whole(checkpoint[f"{hub}.{source}.weight"])], plain))
        for name in LINEARS:
            plan.extend(plan_linear(index, name))
    plan.append(plan_rows("norm", [whole(checkpoint["model.norm.weight"])], plain))
    return [*plan, plan_head(checkpoint["lm_head.weight"], config, quant, rank, tp_size)]


def plan_head(source: TensorSource, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int) -> PlannedTensors:
    """Rank `rank`'s rows of lm_head, normalised where the version says so, padded with rows of zeros."""
    convert = _converter(quant.weights if quant.quantize_lm_head else "none", quant, getattr(torch, config.dtype))
    if config.version.norm_head:
        plain_convert = convert

        def convert(rows):
            return plain_convert(F.normalize(rows.float(), dim=-1, eps=NORM_HEAD_EPS))

    padded = padded_vocab_size(config.vocab_size, tp_size)
    ranges = rank_range(padded, 1, rank, tp_size)
    return plan_rows("lm_head", [(_zero_padded(source, padded), ranges)], convert)


def plan_rows(
    name: str, pieces: list[tuple[TensorSource, list[Range]]], convert: Converter, columns: Range | None = None
) -> PlannedTensors:
    """The given row ranges of the sources one after another, converted whole, then cut to `columns`."""
    width = pieces[0][0].shape[1:]
    example = _cut_columns(convert(torch.zeros(1, *width, dtype=pieces[0][0].dtype)), columns, width)
    count = sum(stop - start for _, ranges in pieces for start, stop in ranges)

    def blocks() -> Iterator[dict[str, Tensor]]:
        step = max(1, BLOCK_BYTES // (4 * torch.Size(width).numel()))
        for source, ranges in pieces:
            for start, stop in ranges:
                for first in range(start, stop, step):
                    rows = source.read(first, min(first + step, stop))
                    fields = _cut_columns(convert(rows), columns, width)
                    yield {_join(name, field): tensor for field, tensor in fields.items()}

    specs = {_join(name, field): (tensor.dtype, (count, *tensor.shape[1:])) for field, tensor in example.items()}
    return PlannedTensors(specs, blocks)


def whole(source: TensorSource) -> tuple[TensorSource, list[Range]]:
    """All rows of the source, as a piece for plan_rows."""
    return source, [(0, source.shape[0])]


def materialise(plan: list[PlannedTensors]) -> dict[str, Tensor]:
    """The plan's tensors in memory, by engine name."""
    parts: dict[str, list[Tensor]] = {}
    for item in plan:
        for block in item.blocks():
            for name, rows in block.items():
                parts.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def as_stored(dtype: torch.dtype, field: str) -> Converter:
    """The converter that only casts; field "" stands for the tensor's own name."""
    return lambda rows: {field: rows.to(dtype)}


def _converter(weights: str, quant: QuantConfig, dtype: torch.dtype) -> Converter:
    return {
        "none": as_stored(dtype, "weight"),
        "int8": lambda rows: dict(zip(("weight", "scale"), quantise_int8(rows), strict=True)),
        "int4": lambda rows: dict(zip(("packed", "scale"), quantise_int4(rows, quant.group_size, dtype), strict=True)),
    }[weights]


def _join(name: str, field: str) -> str:
    return f"{name}.{field}" if field else name


def _cut_columns(fields: dict[str, Tensor], columns: Range | None, width: tuple[int, ...]) -> dict[str, Tensor]:
    """The rank's columns of each field; a field with fewer columns than inputs (packed, grouped) in proportion."""
    if columns is None or columns == (0, *width):
        return fields

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim == 1 or tensor.shape[1] == 1:
            return tensor  # one value per output channel
        start, stop = (column * tensor.shape[1] // width[0] for column in columns)
        return tensor[:, start:stop]

    return {field: cut(tensor) for field, tensor in fields.items()}


def _zero_padded(source: TensorSource, rows: int) -> TensorSource:
    def read(start: int, stop: int) -> Tensor:
        real = source.read(min(start, source.shape[0]), min(stop, source.shape[0]))
        return F.pad(real, (0, 0, 0, stop - start - real.shape[0]))

    return TensorSource((rows, *source.shape[1:]), source.dtype, read)
