"""Reading a binary folder: the check of what is there, and memory-mapped arrays as tensor sources.

The folder is what hf_baichuan_convert.py writes, or what TensorRT-LLM's script of that name wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baichuan.config import ModelConfig, QuantConfig, WeightOnly
from baichuan.errors import CheckpointError, counted
from baichuan.quant.scaled import LIMITS, scale_for
from baichuan.quant.smoothquant import MODES, Mode, Smoothing
from baichuan.weights.binary.config_ini import SEAL, BinaryConfig
from baichuan.weights.binary.fp8_scales import FILE_NAME, LayerScales, read_fp8_scales
from baichuan.weights.binary.layout import (
    CONFIG_NAME,
    GLOBAL_NAMES,
    MODULE_NAMES,
    NORM_NAMES,
    QKV,
    STORAGE_DTYPES,
    Array,
    Layout,
    has_smoother,
    int8_kind,
)
from baichuan.weights.hub.config_json import SIZES
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint, TensorSource, known, stacked

CACHE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LISTED = 5  # missing files that a message names


@dataclass(frozen=True)
class BinaryFolder:
    """A folder whose config.ini was read.  Arrays are opened, memory-mapped, when they are used."""

    path: Path
    layout: Layout
    smoothed: bool  # weights and norms hold a smoother (-sq with a number)
    by_mode: bool = False  # beside plain weights lies what smooths them in each mode (-sq auto)
    weight_only: WeightOnly | None = None  # form of the calibrated integers that it holds, if any
    device: torch.device = torch.device("cpu")  # where rows and scales are read to

    @property
    def model(self) -> ModelConfig:
        return self.layout.model

    def check(self, quant: QuantConfig, ranks: range) -> None:
        """Raise CheckpointError, naming what is missing or has the wrong size, unless engines can be built."""
        if quant.weights == "smooth_quant" and not (self.smoothed or self.by_mode):
            raise CheckpointError(f"{self.path} was written without -sq; convert the checkpoint again with -sq auto")
        by_mode = self.by_mode and quant.weights == "smooth_quant"
        required = list(self.layout.required(quant, ranks, self.smoothed, self.calibrated(quant), by_mode))
        missing = [array.name for array in required if not (self.path / array.name).is_file()]
        if missing:
            more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of {len(required)} files: {', '.join(missing[:LISTED])}{more}; "
                f"convert the checkpoint again{self._remedy(quant)}"
            )
        for array in required:
            self._check_size(array)

    def calibrated(self, quant: QuantConfig) -> WeightOnly | None:
        """The form of the folder's calibrated integers, where they are what `quant` asks for."""
        form = self.weight_only
        if form is None or form.precision != quant.weights:
            return None
        if form.group_size != quant.group_size:
            raise CheckpointError(
                f"{self.path} holds {form.precision} weights in groups of {form.group_size} and {quant.group_size} is "
                "asked for; leave --weight_only_group_size out, or convert the checkpoint again"
            )
        if form.zero_points != quant.zero_points:
            raise CheckpointError(
                f"{self.path} holds {form.precision} weights {'with' if form.zero_points else 'without'} zeros and the "
                "opposite is asked for; take zero_points from the folder"
            )
        return form

    def integers(self, layer: int, module: str, form: WeightOnly) -> dict[str, TensorSource]:
        """The calibrated fields of records.Int8Weight or Int4Weight of one of the hub's matrices, whole."""
        return {field: self._rows(array) for field, array in self.layout.weight_only(layer, module, form).items()}

    def checkpoint(self) -> Checkpoint:
        """The whole model by the hub's names, rows of whole matrices; where the folder is smoothed, dense and proj
        are divided by their smoothers, so that the model needs none."""
        tensors = {hub: self._rows(self.layout.global_array(hub)) for hub in GLOBAL_NAMES}
        for layer in range(self.model.num_layers):
            for norm in NORM_NAMES:
                tensors[f"model.layers.{layer}.{norm}.weight"] = self.norm(layer, norm)
            for module in MODULE_NAMES:
                tensors[f"model.layers.{layer}.{module}.weight"] = self._whole_matrix(layer, module)
        return tensors

    def norm(self, layer: int, hub_norm: str) -> TensorSource:
        """input_layernorm or post_attention_layernorm as it is stored: a smoothed one is divided by its smoother."""
        return self._rows(self.layout.norm(layer, hub_norm))

    def dense(self, layer: int, linear: str, rank: int) -> TensorSource:
        """A rank's share of one of shard.LINEARS as one matrix; reads the rank's files alone."""
        return stacked([self._rank_matrix(layer, module, rank) for module in LINEARS[linear].modules])

    def smooth_quant(
        self, layer: int, linear: str, rank: int, per_token: bool, per_channel: bool
    ) -> dict[str, TensorSource]:
        """The fields of records.SmoothQuantWeight for a rank's share of one of shard.LINEARS."""
        modules = LINEARS[linear].modules
        kind = int8_kind(per_channel)
        files = [self.layout.weight(layer, module, rank, kind) for module in modules]
        fields = {
            "weight": stacked([self._transposed(file) for file in files]),
            "scale": known(torch.cat([self._channel_scales(layer, each, rank, per_channel) for each in modules])),
        }
        if not per_token:
            fields["input_scale"] = known(self._input_scale(layer, modules))
        if has_smoother(modules[0]):
            fields["smoother"] = known(self._positive(self.layout.smoother(layer, modules[0], rank)))
        return fields

    def smoothing(self, layer: int, linear: str, mode: Mode) -> Smoothing:
        """What smooths one of shard.LINEARS, whole, in a mode."""
        of_modes = {field: self._positive(array) for field, array in self.layout.smoothing(layer, linear).items()}
        return Smoothing(**{field: values[MODES.index(mode)] for field, values in of_modes.items()})

    def kv_scales(self, layer: int, kv_cache: str) -> dict[str, TensorSource]:
        """k_scale and v_scale of an "int8" or "fp8" cache.  A folder of the old script has one number for both, and
        ours, which is sealed, has two."""
        scales = {}
        for which in ("k", "v"):
            array = self.layout.kv_scale(layer, which)
            if not (self.path / array.name).is_file():
                if SEAL in BinaryConfig(self.path):
                    raise CheckpointError(f"{self.path} lacks {array.name}; convert the checkpoint again")
                array = self.layout.output_scale(layer, QKV)
            self._check_size(array)
            absmax = LIMITS[torch.int8] * self._positive(array)
            scales[f"{which}_scale"] = known(scale_for(absmax, CACHE_TYPES[kv_cache]))
        return scales

    def fp8_scales(self) -> list[LayerScales]:
        """The scales that our script adds to the folder; they belong to weights that are not smoothed."""
        if self.smoothed:
            raise CheckpointError(
                f"{self.path} was smoothed (-sq), which FP8 does not use; convert the checkpoint again with -kv alone"
            )
        return read_fp8_scales(self.path / FILE_NAME, self.model.num_layers)

    def _remedy(self, quant: QuantConfig) -> str:
        if quant.weights == "smooth_quant":
            return " with -sq"
        if self.calibrated(quant):
            return " with --use_weight_only"
        return " with -kv" if quant.kv_cache != "none" else ""

    def _check_size(self, array: Array) -> None:
        size = (self.path / array.name).stat().st_size
        if size != array.size:
            shape = " x ".join(map(str, array.shape))
            others = [
                name
                for name, dtype in STORAGE_DTYPES.items()
                if size == array.size // array.dtype.itemsize * dtype.itemsize
            ]
            hint = f", which would fit {others[0]} instead of {array.dtype.name}" if others else ""
            raise CheckpointError(
                f"{self.path / array.name} has {size} bytes, and {shape} {array.dtype.name} takes {array.size}{hint}; "
                f"{CONFIG_NAME} or the file was changed, convert the checkpoint again"
            )

    def _map(self, array: Array) -> np.ndarray:
        try:
            return np.memmap(self.path / array.name, array.dtype, "r", shape=array.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / array.name} cannot be read ({error}); convert the checkpoint again"
            ) from None

    def _rows(self, array: Array) -> TensorSource:
        """The array as it is stored."""
        return TensorSource(
            array.shape,
            _torch_dtype(array),
            lambda a, b: self._require_finite(array, torch.from_numpy(self._map(array)[a:b].copy()).to(self.device)),
        )

    def _transposed(self, array: Array) -> TensorSource:
        """A stored [in, out] as rows [out, in]."""

        def read(start: int, stop: int) -> Tensor:
            columns = torch.from_numpy(self._map(array)[:, start:stop].copy())
            return self._require_finite(array, columns.to(self.device)).t().contiguous()

        return TensorSource(array.shape[::-1], _torch_dtype(array), read)

    def _rank_matrix(self, layer: int, module: str, rank: int) -> TensorSource:
        matrix = self._transposed(self.layout.weight(layer, module, rank))
        if not (self.smoothed and has_smoother(module)):
            return matrix

        def read(start: int, stop: int) -> Tensor:
            return matrix.read(start, stop).float() / self._positive(self.layout.smoother(layer, module, rank))

        return replace(matrix, dtype=torch.float32, read=read)

    def _whole_matrix(self, layer: int, module: str) -> TensorSource:
        """All ranks' shares as the hub's [out_features, in_features]."""
        ranks = range(self.layout.tp_size)
        matrices = [self._rank_matrix(layer, module, rank) for rank in ranks]
        shape = self.layout.hub_shape(module)
        if has_smoother(module):
            return replace(matrices[0], shape=shape, read=lambda a, b: torch.cat([m.read(a, b) for m in matrices], 1))
        pieces = []  # each rank's ranges of the hub's rows, in the hub's order
        for rank, matrix in zip(ranks, matrices, strict=True):
            first = 0
            for start, stop in self.layout.cut(module, rank)[0]:
                pieces.append((start, matrix.rows(first, first + stop - start)))
                first += stop - start
        return stacked([piece for _, piece in sorted(pieces, key=lambda each: each[0])])

    def _channel_scales(self, layer: int, module: str, rank: int, per_channel: bool) -> Tensor:
        scale = self._positive(self.layout.channel_scale(layer, module, rank, "scale_w_quant_orig", per_channel))
        return scale.expand(self.layout.weight(layer, module, rank).shape[1])

    def _input_scale(self, layer: int, modules: tuple[str, ...]) -> Tensor:
        """One scale for linears that share their input; the largest, should their files differ."""
        return torch.stack([1 / self._positive(self.layout.input_scale(layer, module)) for module in modules]).amax(0)

    def _require_finite(self, array: Array, values: Tensor) -> Tensor:
        if values.is_floating_point() and not values.isfinite().all():
            raise CheckpointError(
                f"{self.path / array.name} holds a NaN or an infinity, which no conversion writes; convert the "
                "checkpoint again"
            )
        return values

    def _positive(self, array: Array) -> Tensor:
        values = torch.from_numpy(self._map(array).copy()).to(self.device)
        if not (torch.isfinite(values) & (values > 0)).all():
            raise CheckpointError(
                f"{self.path / array.name} holds a scale that is not a positive number; convert the checkpoint again"
            )
        return values


def open_binary(
    path: Path, model: ModelConfig, tp_size: int, device: torch.device = BinaryFolder.device
) -> BinaryFolder:
    """The folder for `tp_size` ranks, read to the device.  Raises CheckpointError where config.ini does not say so."""
    values = BinaryConfig(path)
    for field, key in SIZES.items():
        if values.integer(key) != getattr(model, field):
            raise CheckpointError(
                f"{path / CONFIG_NAME} says {key} = {values.integer(key)}, and the model has {getattr(model, field)}; "
                "use the folder that was converted from this model"
            )
    ranks = values.integer("tensor_parallelism")
    if ranks != tp_size:
        raise CheckpointError(
            f"{path} was written for {counted(ranks, 'rank')} and the engine has {tp_size}; "
            f"build with --world_size {ranks}, or convert the checkpoint again with -tp {tp_size}"
        )
    storage = values.text("weight_data_type")
    if storage not in STORAGE_DTYPES:
        raise CheckpointError(
            f"{path / CONFIG_NAME} says weight_data_type = {storage}; it is {' or '.join(STORAGE_DTYPES)}"
        )
    if values.text("multi_query_mode", "False") != "False":
        raise CheckpointError(
            f"{path} is in multi-query mode, which no Baichuan model has; convert the checkpoint again"
        )
    model.check_tensor_parallel(tp_size)
    layout = Layout(model, tp_size, STORAGE_DTYPES[storage])
    return BinaryFolder(path, layout, values.smoothed, values.smoothed_by_mode, values.weight_only, device)


def _torch_dtype(array: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
