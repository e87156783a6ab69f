"""Which version a checkpoint is: told by what it proves, asked for where that is not enough, never guessed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import goldens
import hub_folders
import pytest
import scripts
import torch
from hub_folders import small_config

import build
import hf_baichuan_convert
import weight
from baichuan.config import PRESETS
from baichuan.errors import CheckpointError, ConfigError
from baichuan.weights.hub.checkpoint import open_checkpoint, read_model_config
from baichuan.weights.hub.version import MAX_GROWTH

TOKENIZER_OF = {"v1": "v1_7b", "v2": "v2_13b"}  # the golden checkpoint with such a tokenizer


def config_folder(folder: Path, version: str, tokenizer: str | None = None, **changes) -> Path:
    """A small checkpoint's config.json with some values changed, and another's tokenizer.model beside it."""
    (folder / "config.json").write_text(json.dumps(hub_folders.hub_values(small_config(version)) | changes))
    if tokenizer:
        shutil.copy(goldens.checkpoint(TOKENIZER_OF[tokenizer]) / "tokenizer.model", folder)
    return folder


def checkpoint(folder: Path, version: str, tokenizer: str | None = None) -> Path:
    """A small checkpoint; its vocabulary fits the golden tokenizers."""
    model = replace(small_config(version), vocab_size=1000)
    config_folder(folder, version, tokenizer, vocab_size=1000)
    hub_folders.write_weights(folder, hub_folders.tensors(model), "safetensors")
    return folder


def version_of(folder: Path, given: str | None = None) -> str:
    return read_model_config(folder, given, "float16").model_version


@pytest.mark.parametrize("version", PRESETS)
def test_a_released_checkpoint_says_which_it_is(version, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub_folders.hub_values(PRESETS[version])))
    assert version_of(tmp_path) == version


@pytest.mark.parametrize(
    ("version", "vocab_size"),
    [("v2_13b", 125760), ("v2_7b", 125697), ("v1_13b", 64064), ("v1_13b", 64000 + MAX_GROWTH)],
)
def test_a_resized_vocabulary_is_still_its_versions(version, vocab_size, tmp_path):
    values = hub_folders.hub_values(replace(PRESETS[version], vocab_size=vocab_size))
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert version_of(tmp_path) == version
    other = {"v1_13b": "v2_13b", "v2_13b": "v1_13b", "v2_7b": "v1_7b"}[version]
    with pytest.raises(ConfigError, match=rf"vocab_size {vocab_size} \(fits .*\); use --model_version {version}$"):
        version_of(tmp_path, other)


@pytest.mark.parametrize("vocab_size", [63999, 64000 + MAX_GROWTH + 1, 125695, 125696 + MAX_GROWTH + 1])
def test_a_vocabulary_of_another_size_says_nothing(vocab_size, tmp_path):
    with pytest.raises(ConfigError, match="fits v1_13b and v2_13b alike"):
        version_of(config_folder(tmp_path, "v2_13b", vocab_size=vocab_size))


@pytest.mark.parametrize(
    ("tokenizer", "version", "other", "space"), [("v1", "v1_13b", "v2_13b", "a"), ("v2", "v2_13b", "v1_13b", "no")]
)
def test_the_tokenizer_decides_where_the_sizes_do_not(tokenizer, version, other, space, tmp_path):
    config_folder(tmp_path, "v1_13b", tokenizer)
    assert version_of(tmp_path) == version == version_of(tmp_path, version)
    fact = rf"tokenizer.model with {space} space before the text \(fits {tokenizer}_7b, {version}\)"
    with pytest.raises(ConfigError, match=rf"contradicts model_version {other}: {fact}; use --model_version {version}"):
        version_of(tmp_path, other)


def test_an_open_question_is_asked_by_naming_the_candidates(tmp_path):
    config_folder(tmp_path, "v1_13b")
    sentence = r"config.json fits v1_13b and v2_13b alike; say which it is with --model_version v1_13b or v2_13b$"
    with pytest.raises(ConfigError, match=sentence):
        version_of(tmp_path)
    assert version_of(tmp_path, "v2_13b") == "v2_13b"


def test_facts_that_contradict_each_other_are_all_named(tmp_path):
    config_folder(tmp_path, "v1_7b", "v2")  # the class is v1_7b's
    with pytest.raises(ConfigError, match=r"fits no version of Baichuan: .*BaiChuan.*\(fits v1_7b\).*tokenizer.model"):
        version_of(tmp_path)


def test_rotary_tensors_are_no_13b_models(tmp_path):
    model = small_config("v1_13b")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    hub_folders.write_weights(tmp_path, hub_folders.tensors(model) | extra, "safetensors")
    with pytest.raises(CheckpointError, match=r"inv_freq, which 7B models alone have"):
        open_checkpoint(tmp_path, model)


# The scripts


def build_flags(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--model_dir", str(folder), "--dtype", "float32", "--output_dir", str(out), *more]


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_build_refuses_a_resized_second_version_as_the_first(tmp_path, capsys):
    """Refused by config.json alone: no weights are needed."""
    values = hub_folders.hub_values(replace(PRESETS["v2_13b"], vocab_size=125760))
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").touch()
    assert build.main(build_flags(tmp_path, tmp_path / "engine", "--model_version", "v1_13b")) == 2
    sentence = "vocab_size 125760 (fits v2_7b, v2_13b); use --model_version v2_13b"
    assert sentence in last_line(capsys) and not (tmp_path / "engine").exists()


def test_build_refuses_another_version(tmp_path, capsys):
    folder = checkpoint(tmp_path, "v1_13b", "v1")
    assert build.main(build_flags(folder, tmp_path / "engine", "--model_version", "v2_13b")) == 2
    assert "contradicts model_version v2_13b: tokenizer.model with a space before the text" in last_line(capsys)
    assert not (tmp_path / "engine").exists()


def test_build_infers_the_version_and_says_by_what(tmp_path, capsys):
    given = scripts.build_flags(tmp_path / "engine", "v2_13b", "--no_self_check")
    del given[given.index("--model_version") : given.index("--model_version") + 2]
    assert build.main(given) == 0
    assert "model_version v2_13b, by architectures" in capsys.readouterr().err
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["builder_config"]["model_version"] == "v2_13b"


def test_build_asks_and_the_self_check_says_whose_word_it_takes(tmp_path, capsys):
    folder = checkpoint(tmp_path, "v1_13b")
    assert build.main(build_flags(folder, tmp_path / "engine")) == 2
    assert "fits v1_13b and v2_13b alike; say which it is" in last_line(capsys)
    assert build.main(build_flags(folder, tmp_path / "engine", "--model_version", "v1_13b")) == 0
    err = capsys.readouterr().err
    assert "nothing but --model_version says that it is v1_13b, and the self-check takes its word" in err
    assert "same first choice at 100.0 %" in err


def test_the_conversion_asks_and_records(tmp_path, capsys):
    folder, out = checkpoint(tmp_path, "v1_13b"), tmp_path / "out"
    given = ["-i", str(folder), "-o", str(out), "-kv"]
    assert hf_baichuan_convert.main(given) == 2
    assert "say which it is with --model_version v1_13b or v2_13b" in last_line(capsys)
    shutil.copy(goldens.checkpoint("v2_13b") / "tokenizer.model", folder)
    text = tmp_path / "texts.txt"
    text.write_text("Rain fell.\n")
    assert hf_baichuan_convert.main([*given, "--calib_dataset", str(text), "--calib_size", "1"]) == 0
    binary = weight.WeightSource(binary_folder=out / "1-gpu")
    assert weight.read_model(binary, None, "float16").model_version == "v2_13b"
    with pytest.raises(ConfigError, match=r"contradicts model_version v1_13b: model_version 'v2_13b'"):
        weight.read_model(binary, "v1_13b", "float16")
