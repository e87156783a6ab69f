"""The module that the scripts share: one rank's weights from a hub folder, a binary folder, or made up.

read_model(source, model_version, dtype)            the model that a folder holds
rank_tensors(source, model, quant, rank, tp_size)   what goes into the rank's engine file, still unread
load_rank(source, model, quant, rank, tp_size)      the same in memory, as records.ModelWeights
float_model(source, model, tp_size, device)         the whole model, not quantised, to compare with
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from baichuan.config import ModelConfig, QuantConfig, WeightOnly
from baichuan.errors import ConfigError
from baichuan.hf_model.float_model import FloatModel, float_model_of, load_float_model
from baichuan.quant.weight_only import GROUP_SIZES
from baichuan.records import ModelWeights
from baichuan.weights.assemble import assemble
from baichuan.weights.binary.config_ini import BinaryConfig, read_binary_model
from baichuan.weights.binary.folder import open_binary
from baichuan.weights.binary.fp8_scales import read_fp8_scales
from baichuan.weights.calibrated import from_binary, from_fp8_scales
from baichuan.weights.dummy import dummy_checkpoint
from baichuan.weights.hub.adapter import open_merged
from baichuan.weights.hub.config_json import folder_evidence, read_model_config
from baichuan.weights.hub.version import fitting_versions
from baichuan.weights.rank_tensors import TensorBlocks, from_checkpoint, has_groups_of, in_memory
from baichuan.weights.source import Checkpoint, on_device
from baichuan.weights.types import TYPES, needs_calibration

logger = logging.getLogger("baichuan.weight")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from; neither folder stands for dummy weights."""

    hub_folder: Path | None = None
    binary_folder: Path | None = None  # written by hf_baichuan_convert.py
    fp8_scales: Path | None = None  # .npz of the old example, beside a hub folder
    dummy_seed: int = 0
    adapters: tuple[Path, ...] = ()  # LoRA adapters that are merged into the hub folder's weights, in this order

    def __post_init__(self):
        if self.hub_folder and self.binary_folder:
            raise ConfigError(
                f"model_dir {self.hub_folder} and bin_model_dir {self.binary_folder} are both given; "
                "weights come from one place, leave one of them out"
            )
        if self.adapters and not self.hub_folder:
            raise ConfigError(
                f"the adapter {self.adapters[0]} needs the checkpoint that it was trained on; give its model_dir"
            )

    @property
    def folder(self) -> Path | None:
        """None: the weights are made up."""
        return self.hub_folder or self.binary_folder

    def checkpoint(self, model: ModelConfig, tp_size: int, device: torch.device = CPU) -> Checkpoint:
        """The whole model's matrices by the hub's names, their rows read to the device."""
        if self.binary_folder:
            return open_binary(self.binary_folder, model, tp_size, device).checkpoint()
        if self.hub_folder:
            return open_merged(self.hub_folder, model, self.adapters, device)
        return on_device(dummy_checkpoint(model, self.dummy_seed), device)


def read_model(source: WeightSource, model_version: str | None, dtype: str) -> ModelConfig:
    """The model that the source's folder holds.  model_version: None = what the folder proves.

    Raises ConfigError where the folder contradicts model_version or leaves it open, CheckpointError where it is not a
    checkpoint.
    """
    if source.binary_folder:
        return read_binary_model(source.binary_folder, model_version, dtype)
    if source.hub_folder:
        return read_model_config(source.hub_folder, model_version, dtype)
    raise ConfigError("dummy weights have no checkpoint to read; take a ModelConfig from config.PRESETS")


def stored_weight_only(source: WeightSource, model: ModelConfig) -> WeightOnly | None:
    """The weight-only integers that the source's folder holds, and an engine may have as they are; None = none."""
    if source.binary_folder:
        return BinaryConfig(source.binary_folder).weight_only
    if not source.hub_folder:
        return None
    matrices = [each for each in open_merged(source.hub_folder, model, source.adapters).values() if each.int4]
    symmetric = not any("zero" in (each.int4 or {}) for each in matrices)
    sizes = (size for size in (*GROUP_SIZES, 0) if all(has_groups_of(each, size) for each in matrices))
    size = next(sizes, None) if matrices else None
    return None if size is None else WeightOnly("int4", size, symmetric)


def rank_tensors(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int, tp_size: int, device: str = "cpu"
) -> list[TensorBlocks]:
    """Rank `rank`'s engine tensors.

    device: "cuda" = quantise and transpose on a GPU, one rank at a time; the blocks are in its memory.
    Raises CheckpointError for a source that is damaged or is not `model`, ConfigError for a quantisation that needs
    another source or does not divide by tp_size.
    """
    where = torch.device("cpu" if device == "cpu" else f"cuda:{rank % torch.cuda.device_count()}")
    if source.binary_folder:
        return from_binary(open_binary(source.binary_folder, model, tp_size, where), quant, rank)
    checkpoint = source.checkpoint(model, tp_size, where if quant.weights != "none" or source.adapters else CPU)
    if source.fp8_scales:
        scales = read_fp8_scales(source.fp8_scales, model.num_layers)
        return from_fp8_scales(checkpoint, model, quant, scales, rank, tp_size)
    calibrated = TYPES[quant.weights].label if needs_calibration(quant) else None
    if calibrated or quant.kv_cache != "none":
        alone = ", or add --per_token --per_channel" if calibrated and quant.weights == "fp8" else ""
        raise ConfigError(
            f"{calibrated or 'an 8-bit KV cache'} needs calibrated scales and a checkpoint alone has none; "
            f"run hf_baichuan_convert.py and build with --bin_model_dir{alone}"
        )
    return from_checkpoint(checkpoint, model, quant, rank, tp_size)


def load_rank(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int = 0, tp_size: int = 1
) -> ModelWeights:
    """Rank `rank`'s weights in host memory."""
    return assemble(in_memory(rank_tensors(source, model, quant, rank, tp_size)), model, quant)


def float_model(source: WeightSource, model: ModelConfig, tp_size: int = 1, device: str = "cpu") -> FloatModel:
    """The source in float32 as a module of its own (hf_model/network.py), which uses none of the engine's ops.

    A checkpoint is read as what its own files prove; where they leave the version open, a warning says so and the
    model's is taken.  tp_size: of a binary folder.  Raises CheckpointError where a binary folder holds integers alone.
    """
    if source.hub_folder:
        fitting = fitting_versions(folder_evidence(source.hub_folder))
        if len(fitting) > 1:
            logger.warning(
                "%s fits %s alike: nothing but --model_version says that it is %s, and the self-check takes its word",
                *(source.hub_folder, " and ".join(fitting), model.model_version),
            )
        version = fitting[0] if len(fitting) == 1 else model.model_version
        return load_float_model(source.hub_folder, version, torch.device(device), source.adapters)
    float32 = replace(model, dtype="float32")
    checkpoint = source.checkpoint(float32, tp_size)
    if source.binary_folder:
        folder = open_binary(source.binary_folder, float32, tp_size, torch.device(device))
        folder.check(QuantConfig(), range(tp_size))
        checkpoint = folder.checkpoint()
    return float_model_of(float32, checkpoint)
