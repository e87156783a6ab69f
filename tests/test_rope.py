"""The rotary base and scaling of config.json: read in every form, and computed as transformers' Llama does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial

import hub_folders
import numpy as np
import op_cases
import pytest
import torch
from hub_folders import small_config
from transformers import LlamaConfig, LlamaForCausalLM

import build
import run
import weight
from baichuan.calibration.convert import ConvertRequest, convert
from baichuan.config import QuantConfig
from baichuan.engine.self_check import all_logits
from baichuan.errors import CheckpointError, ConfigError
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.modeling import BaichuanForCausalLM, load_hf_model
from baichuan.model import position
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.config_json import read_model_config
from baichuan.weights.hub.rope import read_rope

VERSION = "v1_7b"
IDS = [5, 17, 3, 42, 9, 11, 30, 2, 8, 1] * 3
ROPES = {
    "a larger base": ({"rope_theta": 500000.0}, {"rope_theta": 500000.0, "rope_type": "default"}),
    "scaled": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
    ),
    "both": (
        {"rope_parameters": {"rope_theta": 1000, "rope_type": "linear", "factor": 2}},
        {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.0},
    ),
}
TOLERANCE = 1e-5  # on logits of size 1 in float32: another order of summation


@pytest.fixture(scope="module", params=ROPES)
def rope(request, tmp_path_factory):
    """(a checkpoint's folder, Llama's rope_parameters)"""
    values, parameters = ROPES[request.param]
    folder = tmp_path_factory.mktemp("rope")
    config = small_config(VERSION, "float32")
    (folder / "config.json").write_text(json.dumps(hub_folders.hub_values(config) | values))
    hub_folders.write_weights(folder, hub_folders.tensors(config), "safetensors")
    return folder, parameters


@cache
def llama_weights():
    """The small v1_7b model by Llama's names: W_pack is q, k and v one below the other."""
    weights = {}
    for name, tensor in hub_folders.tensors(small_config(VERSION, "float32")).items():
        if "W_pack" in name:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("W_pack", f"{part}_proj")] = values
        else:
            weights[name] = tensor
    return weights


def llama_logits(parameters):
    config = small_config(VERSION)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=parameters,
        )
    )
    llama.load_state_dict(llama_weights())
    with torch.inference_mode():
        return llama.float().eval()(torch.tensor([IDS])).logits[0]


def executor_logits(folder, kind):
    model = read_model_config(folder, VERSION, "float32")
    weights = weight.load_rank(weight.WeightSource(folder), model, QuantConfig())
    return all_logits(kind(model, QuantConfig(), weights), IDS)


@pytest.mark.parametrize("kind", [ReferenceExecutor, CpuExecutor])
def test_executors_equal_llama(rope, kind):
    folder, parameters = rope
    found = executor_logits(folder, kind)
    assert (found - llama_logits(parameters)).abs().max() < TOLERANCE
    plain = llama_logits({"rope_theta": 10000.0, "rope_type": "default"})
    assert (found - plain).abs().max() > 100 * TOLERANCE


def test_hf_model_equals_llama(rope, tmp_path):
    folder, parameters = rope
    model = load_hf_model(folder, VERSION)
    with torch.inference_mode():
        found = model(torch.tensor([IDS])).logits[0]
    assert (found - llama_logits(parameters)).abs().max() < TOLERANCE
    model.save_pretrained(tmp_path)
    assert read_model_config(tmp_path, VERSION, "float32") == read_model_config(folder, VERSION, "float32")


def test_engines_from_both_kinds_of_folder_equal_llama(rope, tmp_path):
    """Checkpoint -> engine, and checkpoint -> binary folder -> engine; then run.py's logits."""
    folder, parameters = rope
    model = read_model_config(folder, VERSION, "float32")
    request = ConvertRequest(tmp_path / "binary", model, partial(open_checkpoint, folder, model), processes=1)
    binary = convert(request, [IDS], {"rope_theta": "what the command line said"})
    for name, source in {"hub": ["--model_dir", str(folder)], "bin": ["--bin_model_dir", str(binary)]}.items():
        engine, logits = tmp_path / name, tmp_path / f"{name}.npy"
        limits = ["--dtype", "float32", "--max_input_len", "32", "--max_output_len", "8"]
        assert build.main([*source, *limits, "--model_version", VERSION, "--output_dir", str(engine)]) == 0
        (tmp_path / "ids.csv").write_text(",".join(map(str, IDS)))
        given = ["--engine_dir", str(engine), "--input_tokens", str(tmp_path / "ids.csv"), "--max_output_len", "4"]
        assert run.main([*given, "--top_k", "1", "--output_logits_npy", str(logits)]) == 0
        assert np.abs(np.load(logits)[0, 0] - llama_logits(parameters)[-1].numpy()).max() < TOLERANCE


def test_the_table_is_the_formulas():
    scaled = replace(op_cases.rope(), rope_theta=1000.0, rope_factor=2.0)
    cos, sin = position.rope_table(5, scaled)
    angles = np.arange(5)[:, None] / 2 / 1000.0 ** (np.arange(0, 16, 2) / 16)
    assert np.abs(cos.double().numpy() - np.cos(angles)).max() < 6.1e-8  # half a unit in the last place of 1
    assert np.abs(sin.double().numpy() - np.sin(angles)).max() < 6.1e-8


@pytest.mark.parametrize(
    "values, theta, factor",
    [
        ({}, 10000.0, 1.0),
        ({"rope_theta": 500000}, 500000.0, 1.0),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 10000.0, 1.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, 1.0),
        ({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8}}, 2e4, 8.0),
        ({"rope_theta": 2e4, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, 2e4, 1.0),
    ],
)
def test_every_form_is_read(values, theta, factor):
    assert read_rope("config.json", values) == (theta, factor)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rope_theta": "1e6"}, "rope_theta to '1e6'"),
        ({"rope_theta": True}, "rope_theta to 'True'"),
        ({"rope_theta": 0}, "rope_theta to '0'"),
        ({"rope_theta": float("inf")}, "rope_theta to 'inf'"),
        ({"rope_scaling": "linear"}, "no object"),
        ({"rope_scaling": {"type": "linear"}}, "without a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor to '0.5'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*earlier keys"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "'default and linear'"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "asks for rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "sets partial_rotary_factor"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "to 1000000.0 and to 10000.0"),
    ],
)
def test_what_would_not_be_computed_is_refused(values, message):
    with pytest.raises(CheckpointError, match=message):
        read_rope("config.json", values)


def test_a_model_with_alibi_has_no_rotary_base(tmp_path):
    values = hub_folders.hub_values(small_config("v2_13b")) | {"rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="rope_theta 1e[+]06 .* v2_13b has ALiBi"):
        read_model_config(tmp_path, "v2_13b", "float32")
    with pytest.raises(ConfigError, match="rope_theta 1e[+]06 .* v2_13b has ALiBi"):
        BaichuanForCausalLM(BaichuanConfig(model_version="v2_13b", rope_theta=1e6))
