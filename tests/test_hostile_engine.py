"""An engine that somebody changed and sealed again: wrong shapes, types and numbers are one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_engine
import torch
from safetensors.torch import load_file, save_file

from baichuan.config import QuantConfig, SamplingConfig
from baichuan.engine.runtime import open_session
from baichuan.errors import EngineError
from baichuan.executors.open_settings import OpenSettings
from baichuan.generation.logits import Logits
from baichuan.parallel.comm import Solo
from baichuan.records import Step
from baichuan.util import manifest

VERSION = "v1_7b"
GREEDY = SamplingConfig(top_k=1)


def forge(folder: Path, change) -> None:
    """change(tensors) edits the rank file's tensors; digests and seal are made anew."""
    [path] = folder.glob("*.engine")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    values = json.loads((folder / "config.json").read_text())
    values.pop("sha256")
    values["baichuan"]["files"][path.name] = manifest.describe(path)
    (folder / "config.json").write_text(json.dumps(manifest.seal(values)))


def text(folder: Path) -> list[int]:
    return open_session(folder, Solo(), settings=OpenSettings("cpu")).generate([[5, 6, 7]], GREEDY, 3)[0].ids


WEIGHTS = ["none", "int8", "int4"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_engine_that_was_sealed_again_unchanged_runs(weights, tmp_path):
    tiny_engine.build(tmp_path, VERSION, QuantConfig(weights))
    before = text(tmp_path)
    forge(tmp_path, lambda tensors: None)
    assert text(tmp_path) == before


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_tensor_has_its_shape_and_type(weights, tmp_path):
    tiny_engine.build(tmp_path, VERSION, QuantConfig(weights))
    [path] = tmp_path.glob("*.engine")
    content, config = path.read_bytes(), (tmp_path / "config.json").read_bytes()
    for name, tensor in load_file(path).items():
        for wrong in (tensor[:-1].clone(), tensor.to(torch.int16)):
            path.write_bytes(content)
            (tmp_path / "config.json").write_bytes(config)
            forge(tmp_path, lambda tensors, name=name, wrong=wrong: tensors.update({name: wrong}))
            with pytest.raises(EngineError, match=f"{name} is .* and must be"):
                open_session(tmp_path, Solo(), settings=OpenSettings("cpu"))


@pytest.mark.parametrize("name", ["layers.0.qkv.weight", "layers.2.down_proj.weight", "norm", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_among_the_weights(name, value, tmp_path):
    tiny_engine.build(tmp_path, VERSION)

    def change(tensors):
        tensors[name].view(-1)[0] = value

    forge(tmp_path, change)
    with pytest.raises(EngineError, match="a NaN or an infinity"):
        text(tmp_path)


def test_logits_are_looked_at_and_rounded(tmp_path):
    class Fixed:
        def __init__(self, values):
            self.values = torch.tensor([values])

        def forward(self, step):
            return self.values

    step = Step.of([[1]])
    build = tiny_engine.build(tmp_path, VERSION).build
    assert Logits(Fixed([0.1, 70000.0]), build)(step).tolist() == torch.tensor([[0.1, 70000.0]]).tolist()
    rounded = Logits(Fixed([0.1, 1.0]), replace(build, logits_dtype="float16"))(step)
    assert rounded.tolist() == torch.tensor([[0.1, 1.0]]).half().float().tolist() != [[0.1, 1.0]]
    spoilt = Logits(Fixed([0.1, float("nan")]), build)
    with pytest.raises(EngineError, match="a NaN"):
        spoilt(step)
    assert not spoilt.seen, "a GPU's next step is looked at again"
