"""config.json: which version it fits, what of it is used, and everything that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hub_folders
import pytest
from hub_folders import small_config

from baichuan.config import PRESETS
from baichuan.errors import CheckpointError, ConfigError
from baichuan.weights.hub.checkpoint import read_model_config


@pytest.mark.parametrize("version", PRESETS)
@pytest.mark.parametrize("claimed", PRESETS)
def test_a_released_config_fits_its_own_version_only(version, claimed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub_folders.hub_values(PRESETS[version])))
    if version == claimed:
        assert read_model_config(tmp_path, claimed, "bfloat16") == replace(PRESETS[version], dtype="bfloat16")
    else:
        with pytest.raises(
            ConfigError, match=rf"contradicts model_version {claimed}: .*use --model_version {version}$"
        ):
            read_model_config(tmp_path, claimed, "bfloat16")


def config_folder(tmp_path: Path, **changes) -> Path:
    """A v1_13b config.json with some values changed, or removed where the value is ..."""
    values = hub_folders.hub_values(small_config("v1_13b")) | changes
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_a_small_config_leaves_two_versions(tmp_path):
    for version in ("v1_13b", "v2_13b"):
        assert read_model_config(config_folder(tmp_path), version, "float16") == small_config(version)
    with pytest.raises(
        ConfigError, match=r"length in model_max_length \(fits v1_13b, v2_13b\); use --model_version v1"
    ):
        read_model_config(tmp_path, "v2_7b", "float16")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 125696}, r"vocab_size 125696 \(fits v2_7b, v2_13b\); use --model_version v2_13b"),
        ({"hidden_size": 4096}, r"hidden_size 4096 \(fits v1_7b, v2_7b\); no version fits all of it"),
        ({"architectures": ["BaiChuanForCausalLM"]}, r"BaiChuanForCausalLM'\] \(fits v1_7b\)"),
        ({"architectures": ["LlamaForCausalLM"]}, r"\(fits no version\)"),
        ({"max_position_embeddings": 4096}, r"length in max_position_embeddings and model_max_length \(fits v2_7b\)"),
        ({"model_max_length": ...}, r"length in no key \(fits no version\)"),
        ({"model_version": "v2_13b"}, r"model_version 'v2_13b' \(fits v2_13b\)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": "32"}, "hidden_size is '32', not of type int"),
        ({"num_hidden_layers": 0}, "num_layers 0 is out of range"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
    ],
)
def test_contradictions_in_the_config_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_model_config(config_folder(tmp_path, **changes), "v1_13b", "float16")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantization_config": {"quant_method": "hqq", "nbits": 4}}, "quantised by hqq, and only those by gptq"),
        ({"quantization_config": {"bits": 4}}, "quantised by an unnamed method"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": ...}, "model_type None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn'"),
        ({"intermediate_size": ...}, "has no intermediate_size"),
    ],
)
def test_other_models_configs_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_model_config(config_folder(tmp_path, **changes), "v1_13b", "float16")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "'vocab_size' is there twice"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
    ],
)
def test_unreadable_configs_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path, "v1_13b", "float16")


def test_an_unknown_version_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model_version 'v3' is not known"):
        read_model_config(config_folder(tmp_path), "v3", "float16")
