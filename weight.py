"""The module that the scripts share: one rank's weights from a hub folder, a binary folder, or made up.

plan_rank(source, model, quant, rank, tp_size)    the tensors, still unread, for an engine file
load_rank(source, model, quant, rank, tp_size)    the tensors in memory, as records.ModelWeights
load_float32(source, model, tp_size)              the whole model, not quantised, to compare with
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from baichuan.config import ModelConfig, QuantConfig
from baichuan.errors import ConfigError
from baichuan.records import ModelWeights
from baichuan.weights.binary.folder import open_binary
from baichuan.weights.binary.fp8_scales import read_fp8_scales
from baichuan.weights.dummy import dummy_checkpoint
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.layout import assemble
from baichuan.weights.plan import PlannedTensors, materialise, plan_hub
from baichuan.weights.plan_calibrated import plan_binary, plan_fp8
from baichuan.weights.source import Checkpoint


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from; neither folder stands for dummy weights."""

    hub_folder: Path | None = None
    binary_folder: Path | None = None  # written by hf_baichuan_convert.py
    fp8_scales: Path | None = None  # .npz of the old example, beside a hub folder
    dummy_seed: int = 0

    def __post_init__(self):
        if self.hub_folder and self.binary_folder:
            raise ConfigError(
                f"model_dir {self.hub_folder} and bin_model_dir {self.binary_folder} are both given; "
                "weights come from one place, leave one of them out"
            )

    def checkpoint(self, model: ModelConfig, tp_size: int) -> Checkpoint:
        """The whole model's matrices by the hub's names."""
        if self.binary_folder:
            return open_binary(self.binary_folder, model, tp_size).checkpoint()
        if self.hub_folder:
            return open_checkpoint(self.hub_folder, model)
        return dummy_checkpoint(model, self.dummy_seed)


def plan_rank(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int, tp_size: int
) -> list[PlannedTensors]:
    """Rank `rank`'s engine tensors.

    Raises CheckpointError for a source that is damaged or is not `model`, ConfigError for a quantisation that needs
    another source or does not divide by tp_size.
    """
    if source.binary_folder:
        return plan_binary(open_binary(source.binary_folder, model, tp_size), quant, rank)
    checkpoint = source.checkpoint(model, tp_size)
    if source.fp8_scales:
        scales = read_fp8_scales(source.fp8_scales, model.num_layers)
        return plan_fp8(checkpoint, model, quant, scales, rank, tp_size)
    calibrated = {"smooth_quant": "SmoothQuant", "fp8": "FP8"}.get(quant.weights)
    if calibrated or quant.kv_cache != "none":
        raise ConfigError(
            f"{calibrated or 'an 8-bit KV cache'} needs calibrated scales and a checkpoint alone has none; "
            "run hf_baichuan_convert.py and build with --bin_model_dir"
        )
    return plan_hub(checkpoint, model, quant, rank, tp_size)


def load_rank(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int = 0, tp_size: int = 1
) -> ModelWeights:
    """Rank `rank`'s weights in host memory."""
    return assemble(materialise(plan_rank(source, model, quant, rank, tp_size)), model, quant)


def load_float32(source: WeightSource, model: ModelConfig, tp_size: int = 1) -> ModelWeights:
    """The whole model in float32.  tp_size: of a binary folder.  Raises CheckpointError where a binary folder holds
    integers alone."""
    float32, plain = replace(model, dtype="float32"), QuantConfig()
    if source.binary_folder:
        open_binary(source.binary_folder, float32, tp_size).check(plain, range(tp_size))
    return assemble(materialise(plan_hub(source.checkpoint(float32, tp_size), float32, plain, 0, 1)), float32, plain)
