"""Converting a checkpoint and its activation ranges to a binary folder, complete or not at all; config.ini is last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baichuan.calibration.calibrate import calibrate
from baichuan.calibration.request import ConvertRequest
from baichuan.calibration.strengths import calibrate_by_mode, hidden_bytes
from baichuan.calibration.weight_only import quantise_layers
from baichuan.engine.folder import staging
from baichuan.errors import UnsupportedError
from baichuan.executors.device import resolve_device
from baichuan.quant.ranges import LayerRanges
from baichuan.quant.scaled import scale_for
from baichuan.text.settings import TEXT_FILES, copy_text_files
from baichuan.util.processes import run_tasks
from baichuan.util.progress import Progress
from baichuan.util.publishing import publish_folder, synced_meanwhile
from baichuan.weights.binary.config_ini import (
    BY_MODE_KEY,
    GROUP_SIZE_KEY,
    PRECISION_KEY,
    SYMMETRIC_KEY,
    write_binary_config,
)
from baichuan.weights.binary.fp8_scales import FILE_NAME, MODULES, LayerScales, write_fp8_scales
from baichuan.weights.binary.layout import CONFIG_NAME, GLOBAL_NAMES, STORAGE_DTYPES, Layout
from baichuan.weights.binary.write import BinaryWriter
from baichuan.weights.folded import Factors, folded
from baichuan.weights.hub.config_json import SIZES
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
BYTES_PER_PROCESS = 256 << 20  # output per process; starting a process takes longer than writing less
DISK_SLACK_BYTES = 16 << 20


def convert(request: ConvertRequest, samples: Sequence[Sequence[int]], settings: Mapping[str, Any]) -> Path:
    """Calibrate on the samples (token ids) and write the folder, which is returned.

    settings: what config.ini keeps of the command line and of the hub's config.json.
    """
    layout = Layout(request.model, request.tp_size, STORAGE_DTYPES[request.storage_type])
    with staging(request.folder) as staged:
        _require_disk(request, layout, samples)
        device = resolve_device(request.device)
        tokens = sum(map(len, samples))
        logger.info("calibrating on %d texts, %d tokens, with the %s", len(samples), tokens, device.upper())
        writer = BinaryWriter(request.open_checkpoint, layout, staged, request.fixed_alpha)
        args = request.open_checkpoint(), request.model, samples, staged, device
        if form := request.weight_only:
            factors, ranges = quantise_layers(*args, form, request.method, partial(writer.write_integers, form))
            writer = replace(writer, open_checkpoint=partial(_open_folded, request.open_checkpoint, factors))
        else:
            ranges = (calibrate_by_mode if request.by_mode else calibrate)(*args)
        size = sum(array.size for array in layout.written(request.fixed_alpha is not None))
        processes = min(request.processes, 1 + size // BYTES_PER_PROCESS)
        with synced_meanwhile(staged, "*.bin"):
            weight_absmax = _write_all(writer, ranges, processes)
        write_fp8_scales(staged / FILE_NAME, _fp8_scales(ranges, weight_absmax))
        model = {key: getattr(request.model, field) for field, key in SIZES.items()}
        model |= {key: request.model.max_positions for key in request.model.version.length_keys}
        model |= {"hidden_act": request.model.hidden_act, "rms_norm_eps": request.model.rms_norm_eps}
        rope = {"rope_theta": request.model.rope_theta, "rope_factor": request.model.rope_factor}
        fixed = {
            "tensor_parallelism": request.tp_size,
            "smoothquant": request.alpha,
            BY_MODE_KEY: request.by_mode,
            "weight_data_type": request.storage_type,
            "multi_query_mode": False,
            "weight_only_method": request.method if form else None,
            PRECISION_KEY: form.precision if form else None,
            GROUP_SIZE_KEY: form.group_size if form else None,
            SYMMETRIC_KEY: form.symmetric if form else None,
        }
        if request.text_folder:
            copy_text_files(request.text_folder, staged)
        write_binary_config(staged, model | dict(settings) | rope | fixed)
        _publish(staged, request.folder)
    return request.folder


def _open_folded(open_checkpoint: Callable[[], Checkpoint], factors: Sequence[Factors]) -> Checkpoint:
    return folded(open_checkpoint(), factors)


def _write_all(writer: BinaryWriter, ranges: Sequence[LayerRanges], processes: int) -> list[dict[str, list[float]]]:
    """Write every array; returns max|W| of each layer's matrices by hub name, see BinaryWriter.write_linear."""
    tasks: dict[Any, Callable[[], Any]] = {
        (layer, name): partial(writer.write_linear, layer, name, ranges[layer])
        for layer in range(len(ranges))
        for name in LINEARS
    }
    tasks |= {(None, name): partial(writer.write_global, name) for name in GLOBAL_NAMES}
    found: list[dict[str, list[float]]] = [{} for _ in ranges]
    with Progress("writing", len(tasks), "matrix") as progress:
        for (layer, _), result in run_tasks(tasks, min(processes, len(tasks)), "use fewer, e.g. --processes 1"):
            if layer is not None:
                found[layer] |= result
            progress.advance()
    return found


def _fp8_scales(ranges: Sequence[LayerRanges], weight_absmax: Sequence[Mapping[str, list[float]]]) -> list[LayerScales]:
    """The scales that --enable_fp8 needs, for the weights before smoothing."""

    def scale(absmax: float) -> float:
        return scale_for(torch.tensor(absmax), E4M3).item()

    layers = []
    for seen, absmax in zip(ranges, weight_absmax, strict=True):
        activation, weights = {}, {}
        for name, linear in LINEARS.items():
            of_modules = [each for module in linear.modules for each in absmax[module]]
            for module, weight in zip(MODULES[name], of_modules, strict=True):
                activation[module] = scale(seen.linears[name].x.max().item())
                weights[module] = scale(weight)
        layers.append(LayerScales(activation, weights, {"k_scale": scale(seen.k), "v_scale": scale(seen.v)}))
    return layers


def _require_disk(request: ConvertRequest, layout: Layout, samples: Sequence[Sequence[int]]) -> None:
    """Raise UnsupportedError unless the folder and the calibration's hidden states fit on the disk."""
    written = layout.written(request.fixed_alpha is not None, request.weight_only, request.by_mode)
    arrays = {array.name: array.size for array in written}
    needed = sum(arrays.values()) + DISK_SLACK_BYTES
    needed += (8 if request.weight_only else 4) * sum(map(len, samples)) * request.model.hidden_size
    needed += hidden_bytes(request.model, samples) if request.by_mode else 0
    free = shutil.disk_usage(request.folder).free
    logger.info("the folder takes %.2f GB; %.2f GB are free on its disk", sum(arrays.values()) / 1e9, free / 1e9)
    if needed > free:
        raise UnsupportedError(
            f"the conversion needs {needed / 1e9:.2f} GB on the disk of {request.folder} and {free / 1e9:.2f} GB are "
            "free; free some, choose another --out-dir, or use --storage-type fp16"
        )


def _publish(staged: Path, folder: Path) -> None:
    """Put a complete conversion in the place of the one before, in one step."""
    arrays = (path.name for path in folder.glob("model.layers.*.bin"))
    publish_folder(staged, folder, {CONFIG_NAME, *arrays, *TEXT_FILES}, CONFIG_NAME)
