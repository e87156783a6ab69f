"""The conversion to a binary folder: in several processes, over an older one, and when it fails."""

import multiprocessing
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from binary_folders import converted, float_logits, logits
from binary_models import ROTARY, make_checkpoint, make_samples

from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError, UnsupportedError


def test_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("baichuan.calibration.convert.BYTES_PER_PROCESS", 1)
    alone = converted(0.5, 2)
    request = ConvertRequest(tmp_path, ROTARY, partial(make_checkpoint, ROTARY), 2, processes=2, alpha=0.5)
    several = convert(request, make_samples(ROTARY), {"in_file": "made up", "architectures": ["BaichuanForCausalLM"]})
    names = {path.name for path in alone.iterdir()}
    assert names == {path.name for path in several.iterdir()}, "nothing unfinished stays"
    for name in names - {"fp8_scales.npz"}:  # an archive holds its members' times
        assert (several / name).read_bytes() == (alone / name).read_bytes(), name


def test_a_new_conversion_replaces_the_old_one_whole(tmp_path):
    def run(alpha):
        request = ConvertRequest(tmp_path, ROTARY, partial(make_checkpoint, ROTARY), processes=1, alpha=alpha)
        return convert(request, make_samples(ROTARY), {})

    run(0.5)
    folder = run(None)
    assert not list(folder.glob("*smoother*")) and not list(folder.glob("*mlp*int8*"))
    torch.testing.assert_close(logits(lambda _: folder, QuantConfig(), 1), float_logits(), rtol=1e-4, atol=2e-5)


def test_a_failed_conversion_leaves_no_folder_that_loads(tmp_path):
    def broken():
        made = make_checkpoint(ROTARY)
        made["model.layers.1.mlp.down_proj.weight"].read(0, 1)[0, 0] = np.nan
        return made

    request = ConvertRequest(tmp_path, ROTARY, broken, processes=1, alpha=0.5)
    with pytest.raises(CheckpointError, match="not finite"):
        convert(request, make_samples(ROTARY), {})
    assert list((tmp_path / "1-gpu").iterdir()) == []


def dying_checkpoint():
    """Ends the process that opens it, unless it is the one that started the others."""
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return make_checkpoint(ROTARY)


def test_a_killed_process_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("baichuan.calibration.convert.BYTES_PER_PROCESS", 1)
    request = ConvertRequest(tmp_path, ROTARY, dying_checkpoint, processes=2)
    with pytest.raises(UnsupportedError, match="one of 2 processes was killed.* --processes 1"):
        convert(request, make_samples(ROTARY), {})
    assert list((tmp_path / "1-gpu").iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    request = ConvertRequest(tmp_path, ROTARY, partial(make_checkpoint, ROTARY), processes=1)
    with pytest.raises(UnsupportedError, match="needs 0.02 GB on the disk of .* and 0.00 GB are free"):
        convert(request, make_samples(ROTARY), {})
