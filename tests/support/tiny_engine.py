"""Engines made from the tiny golden checkpoints, whose weights come from hf_model's reading of them, and articles."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import goldens

from baichuan.config import BuildConfig, QuantConfig
from baichuan.engine.builder import BuildRequest, build_engine
from baichuan.engine.folder import Engine
from baichuan.evaluation.datasets import Sample
from baichuan.hf_model.modeling import load_hf_model
from baichuan.util import manifest
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.rank_tensors import from_checkpoint
from baichuan.weights.source import known

SAMPLES = [
    Sample("en", "The council met on Monday and it does n't plan to build the bridge.", "No bridge will be built."),
    Sample("zh", "喜马拉雅山位于中国与尼泊尔之间，珠穆朗玛峰是世界最高的山峰。", "珠峰最高。"),
    Sample("short", "Rain.", "Rain fell."),
    *(Sample(f"n{n}", "Rivers rose in the north for " + "many " * n + "days.", "Rivers rose.") for n in range(8)),
]
LIMITS = dict(max_batch_size=8, max_input_len=256, max_output_len=64, max_beam_width=4)


def build(folder: Path, version: str, quant: QuantConfig | None = None, tp_size: int = 1, **limits) -> Engine:
    """A float32 engine of the golden checkpoint of `version`."""
    quant, checkpoint = quant or QuantConfig(), goldens.checkpoint(version)
    model = read_model_config(checkpoint, version, "float32")
    tensors = {name: known(tensor) for name, tensor in load_hf_model(checkpoint, version).state_dict().items()}
    rank_tensors = partial(_rank_tensors, tensors, model, quant, tp_size)
    return build_engine(BuildRequest(folder, model, quant, BuildConfig(tp_size, **{**LIMITS, **limits}), rank_tensors))


def _rank_tensors(tensors, model, quant, tp_size, rank):
    return from_checkpoint(tensors, model, quant, rank, tp_size)


def snapshot(folder: Path) -> dict[str, dict]:
    """Sizes and digests of the folder's files by name."""
    return {path.name: manifest.describe(path) for path in folder.iterdir()}


@cache
def engine(version: str, tp_size: int = 1, weights: str = "none") -> Engine:
    """build(), once for all tests of a process; the folder goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-engine-")
    _folders.append(folder)
    return build(Path(folder.name), version, QuantConfig(weights), tp_size)


_folders: list[tempfile.TemporaryDirectory] = []
