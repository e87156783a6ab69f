"""The module that the scripts share: one rank's weights from a hub folder, a binary folder, or made up.

plan_rank(source, model, quant, rank, tp_size)    the tensors, still unread, for an engine file
load_rank(source, model, quant, rank, tp_size)    the tensors in memory, as records.ModelWeights
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baichuan.checkpoint.dummy import dummy_checkpoint
from baichuan.checkpoint.hf import open_checkpoint
from baichuan.checkpoint.layout import assemble
from baichuan.checkpoint.plan import PlannedTensors, materialise, plan_hub
from baichuan.config import ModelConfig, QuantConfig
from baichuan.errors import ConfigError
from baichuan.records import ModelWeights


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from; neither folder stands for dummy weights."""

    hub_folder: Path | None = None
    binary_folder: Path | None = None  # written by hf_baichuan_convert.py
    dummy_seed: int = 0

    def __post_init__(self):
        if self.hub_folder and self.binary_folder:
            raise ConfigError(
                f"model_dir {self.hub_folder} and bin_model_dir {self.binary_folder} are both given; "
                "weights come from one place, leave one of them out"
            )


def plan_rank(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int, tp_size: int
) -> list[PlannedTensors]:
    """Rank `rank`'s engine tensors.  Raises CheckpointError or ConfigError for a source that does not fit `model`."""
    if source.hub_folder:
        checkpoint = open_checkpoint(source.hub_folder, model)
    else:
        checkpoint = dummy_checkpoint(model, source.dummy_seed)
    return plan_hub(checkpoint, model, quant, rank, tp_size)


def load_rank(
    source: WeightSource, model: ModelConfig, quant: QuantConfig, rank: int = 0, tp_size: int = 1
) -> ModelWeights:
    """Rank `rank`'s weights in host memory."""
    return assemble(materialise(plan_rank(source, model, quant, rank, tp_size)), model, quant)
