"""Writing a binary folder's arrays, one linear of one layer at a time, in blocks of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baichuan.config import WeightOnly
from baichuan.errors import CheckpointError
from baichuan.quant.grid import Grid
from baichuan.quant.int8_scales import int8_scales, to_int8
from baichuan.quant.ranges import LayerRanges, LinearRange
from baichuan.quant.scaled import require_finite, scale_for
from baichuan.quant.smoothquant import MODES, smoother, smoothing
from baichuan.quant.weight_only import pack_int4
from baichuan.weights.binary.layout import CHANNEL_SCALES, LINEAR_OF, NORM_NAMES, QKV, Array, Layout, has_smoother
from baichuan.weights.shard import LINEARS, NORM_BEFORE
from baichuan.weights.source import Checkpoint, TensorSource

BLOCK_BYTES = 8 << 20  # a block of a matrix's rows in float32; a process holds a few at a time
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class BinaryWriter:
    """What all parts of one conversion share; pickled for the writing processes."""

    open_checkpoint: Callable[[], Checkpoint]
    layout: Layout
    folder: Path
    alpha: float | None  # SmoothQuant's strength; None: only QKV gets 8-bit outputs, and nothing is smoothed

    def write_global(self, hub_name: str) -> None:
        """The embedding, the last norm or lm_head, as they are."""
        source = self.open_checkpoint()[hub_name]
        mapped = self._create(self.layout.global_array(hub_name))
        for start, stop in source.blocks(BLOCK_BYTES):
            mapped[start:stop] = self._stored(source.read(start, stop).float(), hub_name)

    def write_linear(self, layer: int, name: str, ranges: LayerRanges) -> dict[str, list[float]]:
        """One of shard.LINEARS with its scales, its smoother, and the norm before it.

        Returns max|W| of each projection (q, k and v of W_pack) of each of its matrices before smoothing, by hub name.
        """
        linear, seen = LINEARS[name], ranges.linears[name]
        checkpoint = self.open_checkpoint()
        sources = {each: checkpoint[f"model.layers.{layer}.{each}.weight"] for each in linear.modules}
        columns, rows = zip(*(_absmax(source) for source in sources.values()), strict=True)
        factor = torch.ones(seen.x.shape)
        if self.alpha is not None:
            factor = smoother(seen.x, torch.stack(columns).amax(0), self.alpha)
        if name in NORM_BEFORE:
            self._write_norm(checkpoint, layer, NORM_BEFORE[name], factor)
        elif self.alpha is not None:
            for rank in range(self.layout.tp_size):
                start, stop = linear.cut(next(iter(sources.values())).shape, rank, self.layout.tp_size)[1]
                self._write(self.layout.smoother(layer, linear.modules[0], rank), factor[start:stop])
        if seen.alphas is not None:
            self._write_smoothing(layer, name, seen, torch.stack(columns).amax(0), list(sources.values()))
        if name == "qkv":
            for which, absmax in (("k", ranges.k), ("v", ranges.v)):
                self._write(self.layout.kv_scale(layer, which), scale_for(torch.tensor([absmax]), torch.int8))
        outputs = seen.y.split([source.shape[0] for source in sources.values()])
        for (each, source), y in zip(sources.items(), outputs, strict=True):
            self._write_matrix(layer, each, source, factor, (seen.x / factor).amax(), y)
        return {
            each: absmax.view(linear.projections, -1).amax(1).tolist()
            for each, absmax in zip(sources, rows, strict=True)
        }

    def write_integers(self, form: WeightOnly, layer: int, name: str, q: Tensor, grid: Grid) -> None:
        """Calibrated integers of one of shard.LINEARS, [out_features, in_features] int8, and their scales and zeros."""
        first = 0
        for module in LINEARS[name].modules:
            rows = slice(first, first + self.layout.hub_shape(module)[0])
            fields = {"weight": q[rows]} if form.precision == "int8" else {"packed": pack_int4(q[rows])}
            fields |= {"scale": grid.scale[rows]} | ({} if grid.zero is None else {"zero": grid.zero[rows]})
            for field, array in self.layout.weight_only(layer, module, form).items():
                self._write(array, fields[field].cpu())
            first = rows.stop

    def _write_norm(self, checkpoint: Checkpoint, layer: int, hub_norm: str, factor: Tensor) -> None:
        """Write the norm's weight divided by the smoother, which makes the norm's output the smoothed input."""
        source = checkpoint[f"model.layers.{layer}.{hub_norm}.weight"]
        weight = source.read(0, source.shape[0]).float() / factor
        self._write(self.layout.norm(layer, hub_norm), self._stored(weight, NORM_NAMES[hub_norm]))

    def _write_smoothing(
        self, layer: int, name: str, seen: LinearRange, columns: Tensor, sources: Sequence[TensorSource]
    ) -> None:
        """What smooths one of shard.LINEARS in each mode.  columns: [in_features], max|W| of each input channel"""
        assert seen.alphas is not None
        of_modes = []
        for mode in MODES:
            factor = smoother(seen.x, columns, seen.alphas[mode])
            rows = torch.cat([_absmax(source, factor)[1] for source in sources])
            of_modes.append(smoothing(seen.x, factor, rows, LINEARS[name].projections * len(sources)))
        for field, array in self.layout.smoothing(layer, name).items():
            self._write(array, torch.stack([getattr(each, field) for each in of_modes]))

    def _write_matrix(self, layer: int, name: str, source: TensorSource, factor, x_absmax: Tensor, y: Tensor) -> None:
        """One hub matrix: as it is stored, and where it is 8-bit, its integers and scales."""
        projections = LINEAR_OF[name].projections
        ranks, scales = range(self.layout.tp_size), None
        files = {"": [self._create(self.layout.weight(layer, name, rank)) for rank in ranks]}
        if self.alpha is not None or name == QKV:
            y_absmax = y.view(projections, -1)[-2:].amax()  # for QKV only k and v: q is never cached
            scales = int8_scales(x_absmax, y_absmax, _absmax(source, factor)[1], projections)
            self._write_scales(layer, name, scales)
            for kind in ("int8", "int8.col"):
                files[kind] = [self._create(self.layout.weight(layer, name, rank, kind)) for rank in ranks]
        for start, stop in source.blocks(BLOCK_BYTES):
            rows = source.read(start, stop).float() * factor
            self._place(files[""], name, start, self._stored(rows, f"layer {layer}'s {name}"))
            if scales is not None:
                for kind, suffix in (("int8", ""), ("int8.col", ".col")):
                    q = to_int8(rows, scales[f"scale_w_orig_quant{suffix}"][start:stop])
                    self._place(files[kind], name, start, q.numpy())

    def _place(self, files: list[np.ndarray], name: str, first: int, rows: np.ndarray) -> None:
        """Put the hub matrix's rows from `first` on into the ranks' transposed files."""
        for rank, mapped in enumerate(files):
            ranges, (left, right) = self.layout.cut(name, rank)
            column = 0  # where the range starts in the file
            for start, stop in ranges:
                a, b = max(start, first), min(stop, first + len(rows))
                if a < b:
                    columns = torch.from_numpy(rows[a - first : b - first, left:right]).t()
                    mapped[:, column + a - start : column + b - start] = columns.contiguous().numpy()  # by blocks: fast
                column += stop - start

    def _write_scales(self, layer: int, name: str, scales: Mapping[str, Tensor]) -> None:
        self._write(self.layout.input_scale(layer, name), scales["scale_x_orig_quant"])
        self._write(self.layout.output_scale(layer, name), scales["scale_y_quant_orig"])
        for kind in CHANNEL_SCALES:
            for per_channel, suffix in ((False, ""), (True, ".col")):
                whole = scales[kind + suffix]
                for rank in range(self.layout.tp_size):
                    array = self.layout.channel_scale(layer, name, rank, kind, per_channel)
                    rows = [(0, len(whole))] if has_smoother(name) else self.layout.cut(name, rank)[0]
                    values = torch.cat([whole[start:stop] for start, stop in rows])
                    self._write(array, values[: array.shape[0]])

    def _write(self, array: Array, values: Tensor | np.ndarray) -> None:
        if isinstance(values, Tensor):
            values = values.numpy()
        np.ascontiguousarray(values, array.dtype).reshape(array.shape).tofile(self.folder / array.name)

    def _create(self, array: Array) -> np.ndarray:
        """A new file of the array's size, mapped for writing."""
        path = self.folder / array.name
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, array.size)  # a full disk is an error now, not a crash later
        return np.memmap(path, array.dtype, "r+", shape=array.shape)

    def _stored(self, values: Tensor, name: str) -> np.ndarray:
        """values in the folder's storage type."""
        if self.layout.storage.itemsize == 2 and not values.abs().max() <= FLOAT16_MAX:
            raise CheckpointError(f"{name} has values beyond float16's {FLOAT16_MAX:g}; use --storage-type fp32")
        return values.numpy().astype(self.layout.storage)


def _absmax(source: TensorSource, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """max|W * factor| of each column and of each row.  Raises CheckpointError for a NaN or an infinity."""
    columns, rows = torch.zeros(source.shape[1]), torch.empty(source.shape[0])
    for start, stop in source.blocks(BLOCK_BYTES):
        magnitudes = (source.read(start, stop).float() * factor).abs_()
        columns = torch.maximum(columns, magnitudes.amax(0))
        rows[start:stop] = magnitudes.amax(1)
    return columns, require_finite(rows)
