"""One rank's engine tensors, described before any weight is read: names, types, shapes, and how their rows are made.

The whole row is quantised first and the rank's columns are cut afterwards, so that every tensor-parallel size holds
the same integers and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig, QuantConfig
from baichuan.quant.weight_only import check_group_size
from baichuan.weights.converters import Converter, cast
from baichuan.weights.shard import LINEARS, NORMS, Range, hub_shapes, padded_vocab_size, rank_ranges
from baichuan.weights.source import Checkpoint, TensorSource, known
from baichuan.weights.types import converter_of

BLOCK_BYTES = 32 << 20  # a block of a weight's rows in float32; a build holds a few at a time
NORM_HEAD_EPS = 1e-12  # torch.nn.functional.normalize's default, as in the original NormHead


@dataclass(frozen=True)
class TensorBlocks:
    """Tensors that are made together, block of rows by block of rows."""

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # by engine name
    blocks: Callable[[], Iterator[dict[str, Tensor]]]  # each tensor's next rows, until all are complete


@dataclass(frozen=True)
class LinearConverters:
    """How one of shard.LINEARS becomes a weight record."""

    projections: Sequence[Converter]  # one for each projection of each of the hub's matrices, in their order
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # fields that do not depend on the rows


LinearTensors = Callable[[int, str], list[TensorBlocks]]  # (layer, one of shard.LINEARS) -> its tensors


def from_checkpoint(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig,
    rank: int,
    tp_size: int,
    converters: Callable[[int, str], LinearConverters] | None = None,
) -> list[TensorBlocks]:
    """Rank `rank`'s engine tensors from whole matrices by the hub's names.

    converters(layer, one of shard.LINEARS): None = those of `quant`, which must then need no calibration.
    Raises ConfigError when the model, or int4's groups of input channels, do not divide by tp_size.
    """

    def weights_alone(_: int, name: str) -> LinearConverters:
        linear, convert = LINEARS[name], converter_of(quant.weights, quant, getattr(torch, config.dtype))
        return LinearConverters([convert] * (len(linear.modules) * linear.projections))

    def linear_tensors(layer: int, name: str) -> list[TensorBlocks]:
        linear, of_this = LINEARS[name], (converters or weights_alone)(layer, name)
        sources = [checkpoint[f"model.layers.{layer}.{module}.weight"] for module in linear.modules]
        if converters is None and quant.weights == "int4" and _holds_integers(sources, quant.group_size):
            return integer_tensors(layer, name, [source.int4 or {} for source in sources], config, quant, rank, tp_size)
        cuts = [linear.cut(source.shape, rank, tp_size, quant.group_size) for source in sources]
        columns = cuts[0][1]
        if quant.weights == "int4":
            check_group_size(quant.group_size, columns[1] - columns[0], name)
        held = [(source, rows) for source, (ranges, _) in zip(sources, cuts, strict=True) for rows in ranges]
        pieces = [Piece(*each, convert) for each, convert in zip(held, of_this.projections, strict=True)]
        prefix = f"layers.{layer}.{name}"
        return [
            from_pieces(prefix, pieces, columns),
            *(as_stored(f"{prefix}.{field}", known(values)) for field, values in of_this.constants.items()),
        ]

    return whole_model(checkpoint, config, quant, rank, tp_size, linear_tensors)


def integer_tensors(
    layer: int,
    name: str,
    matrices: Sequence[Mapping[str, TensorSource]],
    config: ModelConfig,
    quant: QuantConfig,
    rank: int,
    tp_size: int,
) -> list[TensorBlocks]:
    """Rank `rank`'s rows and columns of integers that are known already.

    matrices: for each of the linear's matrices of the hub, the whole fields of its weight record.
    """
    linear, dtype = LINEARS[name], getattr(torch, config.dtype)
    in_features = hub_shapes(config)[f"model.layers.{layer}.{linear.modules[0]}.weight"][1]
    rows, (start, stop) = linear.cut((matrices[0]["scale"].shape[0], in_features), rank, tp_size, quant.group_size)
    if quant.weights == "int4":
        check_group_size(quant.group_size, stop - start, name)
    tensors = []
    for field_name, example in matrices[0].items():
        of_dtype = quant.weights == "int4" and example.dtype.is_floating_point  # a scale is in the model's dtype
        convert = cast(dtype if of_dtype else example.dtype, "")
        pieces = [Piece(fields[field_name], each, convert) for fields in matrices for each in rows]
        # A column of the field stands for several input channels: two of packed integers, a group of scales and zeros.
        width = example.shape[-1]
        columns = start * width // in_features, stop * width // in_features
        tensors.append(from_pieces(f"layers.{layer}.{name}.{field_name}", pieces, columns))
    return tensors


def _holds_integers(sources: Sequence[TensorSource], group_size: int) -> bool:
    """Whether all the matrices' 4-bit integers are known, in groups of this size and of one form."""
    forms = {tuple(source.int4 or ()) for source in sources}
    return len(forms) == 1 and all(has_groups_of(source, group_size) for source in sources)


def has_groups_of(source: TensorSource, group_size: int) -> bool:
    """Whether the matrix's 4-bit integers are known, in groups of this size; 0 = the whole row."""
    columns = source.shape[-1]
    return source.int4 is not None and source.int4["scale"].shape[1] == columns // (group_size or columns)


def whole_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig,
    rank: int,
    tp_size: int,
    linear_tensors: LinearTensors,
) -> list[TensorBlocks]:
    """The embedding, the norms and lm_head from the checkpoint, the layers' linears from linear_tensors."""
    config.check_tensor_parallel(tp_size)
    plain = cast(getattr(torch, config.dtype), "")

    def same(name: str, hub_name: str) -> TensorBlocks:
        source = checkpoint[f"{hub_name}.weight"]
        return from_pieces(name, [Piece(source, (0, source.shape[0]), plain)])

    tensors = [same("embedding", "model.embed_tokens")]
    for layer in range(config.num_layers):
        tensors += [same(f"layers.{layer}.{name}", f"model.layers.{layer}.{norm}") for name, norm in NORMS.items()]
        for name in LINEARS:
            tensors += linear_tensors(layer, name)
    return [*tensors, same("norm", "model.norm"), _head(checkpoint["lm_head.weight"], config, quant, rank, tp_size)]


def _head(source: TensorSource, config: ModelConfig, quant: QuantConfig, rank: int, tp_size: int) -> TensorBlocks:
    """Rank `rank`'s rows of lm_head, normalised where the version says so, padded with rows of zeros."""
    convert = converter_of(quant.weights if quant.quantize_lm_head else "none", quant, getattr(torch, config.dtype))
    if config.version.norm_head:
        plain_convert = convert

        def convert(rows: Tensor) -> dict[str, Tensor]:
            return plain_convert(F.normalize(rows.float(), dim=-1, eps=NORM_HEAD_EPS))

    padded = padded_vocab_size(config.vocab_size, tp_size)
    [rows] = rank_ranges(padded, 1, rank, tp_size)
    return from_pieces("lm_head", [Piece(_zero_padded(source, padded), rows, convert)])


@dataclass(frozen=True)
class Piece:
    """Some whole rows of a tensor and how they are converted."""

    source: TensorSource
    rows: Range
    convert: Converter


def from_pieces(name: str, pieces: Sequence[Piece], columns: Range | None = None) -> TensorBlocks:
    """The pieces' rows one after another, converted whole, then cut to `columns`."""
    width = pieces[0].source.shape[1:]
    example = pieces[0].convert(torch.zeros(1, *width, dtype=pieces[0].source.dtype))
    count = sum(stop - start for start, stop in (piece.rows for piece in pieces))

    def named(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name}.{field}" if field else name: _cut_columns(values, columns, width)
            for field, values in fields.items()
        }

    def blocks() -> Iterator[dict[str, Tensor]]:
        for piece in pieces:
            for start, stop in piece.source.blocks(BLOCK_BYTES, [piece.rows]):
                yield named(piece.convert(piece.source.read(start, stop)))

    specs = {key: (values.dtype, (count, *values.shape[1:])) for key, values in named(example).items()}
    return TensorBlocks(specs, blocks)


def as_stored(name: str, source: TensorSource) -> TensorBlocks:
    """The whole source as it is."""
    return from_pieces(name, [Piece(source, (0, source.shape[0]), cast(source.dtype, ""))])


def in_memory(tensors: Sequence[TensorBlocks]) -> dict[str, Tensor]:
    """All the tensors, read into memory, by engine name."""
    found: dict[str, list[Tensor]] = {}
    for item in tensors:
        for block in item.blocks():
            for name, rows in block.items():
                found.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}


def total_bytes(tensors: Sequence[TensorBlocks]) -> int:
    """Size of the tensors' data."""
    specs = [spec for item in tensors for spec in item.specs.values()]
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs)


def _cut_columns(values: Tensor, columns: Range | None, width: tuple[int, ...]) -> Tensor:
    """The rank's columns of a field, in proportion where one column stands for several inputs (packed, grouped)."""
    if columns is None or columns == (0, *width) or values.ndim == 1 or values.shape[1] == 1:
        return values  # one value per output channel, the same on every rank
    start, stop = (column * values.shape[1] // width[0] for column in columns)
    return values[:, start:stop]


def _zero_padded(source: TensorSource, rows: int) -> TensorSource:
    def read(start: int, stop: int) -> Tensor:
        real = source.read(min(start, source.shape[0]), min(stop, source.shape[0]))
        return F.pad(real, (0, 0, 0, stop - start - real.shape[0]))

    return TensorSource((rows, *source.shape[1:]), source.dtype, read)
