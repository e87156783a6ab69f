"""Binary folders of a small model, converted once, and the logits of engines made from them."""

from __future__ import annotations

import configparser
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from binary_models import ROTARY, make_checkpoint, make_samples

from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.config import ModelConfig, QuantConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.parallel.comm import run_ranks
from baichuan.records import Step
from baichuan.weights.assemble import assemble
from baichuan.weights.binary.folder import open_binary
from baichuan.weights.calibrated import from_binary
from baichuan.weights.rank_tensors import from_checkpoint, in_memory


@cache
def converted(alpha: float | None, tp_size: int, model: ModelConfig = ROTARY) -> Path:
    """A float32 folder, made once for all tests of a process; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="binary-folder-")
    _folders.append(folder)
    checkpoint = partial(make_checkpoint, model)
    request = ConvertRequest(
        Path(folder.name), model, checkpoint, tp_size, processes=1, alpha=alpha, storage_type="fp32"
    )
    return convert(request, make_samples(model), {"in_file": "made up", "architectures": ["BaichuanForCausalLM"]})


_folders: list[tempfile.TemporaryDirectory] = []


def copied(where: Path, alpha: float | None, tp_size: int = 1) -> Path:
    """A copy of converted()'s folder, to damage."""
    return Path(shutil.copytree(converted(alpha, tp_size), where / "damaged"))


def scaled_file(folder, name, factor):
    path = folder / name
    (np.fromfile(path, "<f4") * np.float32(factor)).tofile(path)


def edit_config(folder, unseal=True, **changes):
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(folder / "config.ini")
    if unseal:
        parser["baichuan"].pop("sha256")
    for key, value in changes.items():
        if value is None:
            parser["baichuan"].pop(key)
        else:
            parser["baichuan"][key] = value
    with open(folder / "config.ini", "w") as file:
        parser.write(file)


def logits(folder_of, quant, tp_size, model=ROTARY, ids=tuple(range(3, 20))):
    """The reference executor's logits of an engine built from folder_of(tp_size)."""
    path = folder_of(tp_size)

    def run(comm):
        folder = open_binary(path, model, tp_size)
        weights = assemble(in_memory(from_binary(folder, quant, comm.rank)), model, quant)
        executor = ReferenceExecutor(model, quant, weights, comm)
        executor.reset(1, len(ids))
        return executor.forward(Step.of([ids], all_outputs=True))

    results = run_ranks(tp_size, run)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


def float_logits(model=ROTARY, ids=tuple(range(3, 20))):
    weights = assemble(
        in_memory(from_checkpoint(make_checkpoint(model), model, QuantConfig(), 0, 1)), model, QuantConfig()
    )
    executor = ReferenceExecutor(model, QuantConfig(), weights)
    executor.reset(1, len(ids))
    return executor.forward(Step.of([ids], all_outputs=True))


def kl(reference, other):
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
