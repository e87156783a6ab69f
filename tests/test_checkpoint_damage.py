"""Checkpoints in the hub's format that lack something, hold something else or are damaged: each is refused by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import hub_folders
import pytest
import torch
from hub_folders import SHARD, SINGLE, both_formats, small_config, write_index, write_weights

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint

CONFIG = small_config("v2_7b")
UP = "model.layers.1.mlp.up_proj.weight"


def without(name: str):
    return lambda values: values.pop(name)


def setting(name: str, values):
    return lambda tensors: tensors.__setitem__(name, values)


@pytest.mark.parametrize("shards", [0, 2])
@both_formats
@pytest.mark.parametrize(
    "damage, message",
    [
        (without(UP), f"lacks {UP}; download"),
        (
            setting("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32)),
            r"holds model\.layers\.2\..* with 2 layers",
        ),
        (setting(UP, torch.zeros(32, 48)), r"shape \(32, 48\) instead of \(48, 32\)"),
        (setting(UP, torch.zeros(48 * 32)), r"shape \(1536,\) instead of"),
        (setting(UP, torch.zeros(48, 32, dtype=torch.int8)), "is int8"),
        (setting(UP, torch.zeros(48, 32).to(torch.float8_e4m3fn)), "is float8_e4m3fn"),
        (setting(f"{UP}.absmax", torch.zeros(3)), rf"quantised by bitsandbytes in 4 bits \(it holds {UP}"),
        (setting(f"{UP}.quant_state.bitsandbytes__nf4", torch.zeros(3)), "bitsandbytes in 4 bits"),
        (setting(UP.replace("weight", "SCB"), torch.zeros(48)), "bitsandbytes in 8 bits"),
        (setting(UP.replace("weight", "qweight"), torch.zeros(48).int()), "GPTQ or AWQ"),
    ],
)
def test_wrong_tensors_are_refused_by_name(form, shards, damage, message, tmp_path):
    values = hub_folders.tensors(CONFIG)
    damage(values)
    write_weights(tmp_path, values, form, shards)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_another_vocabulary_than_the_configs_is_refused(form, tmp_path):
    write_weights(tmp_path, hub_folders.tensors(CONFIG), form)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight in .* has shape \(50, 32\) instead of \(51, 32\)"):
        open_checkpoint(tmp_path, replace(CONFIG, vocab_size=51))


@pytest.mark.parametrize("cut", [1, 1000])
@pytest.mark.parametrize("shards", [0, 2])
@both_formats
def test_truncated_files_are_refused(form, shards, cut, tmp_path):
    write_weights(tmp_path, hub_folders.tensors(CONFIG), form, shards)
    path = max(tmp_path.glob(f"*.{form}"))
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(CheckpointError, match=rf"{path.name} is (not a readable|a truncated or damaged)"):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_other_content_is_refused(form, tmp_path):
    (tmp_path / SINGLE[form]).write_bytes(b"<html>Not found</html>")
    with pytest.raises(CheckpointError, match=SINGLE[form]):
        open_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize("shards", [0, 2])
@both_formats
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "run git lfs pull in {folder}, or"),
    ],
)
def test_what_a_download_left_unfinished_is_named(form, shards, content, message, tmp_path):
    where = write_weights(tmp_path, hub_folders.tensors(CONFIG), form, shards)
    (tmp_path / (where[UP] if shards else SINGLE[form])).write_bytes(content)
    with pytest.raises(CheckpointError, match=message.format(folder=tmp_path)):
        open_checkpoint(tmp_path, CONFIG)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds none of model.safetensors, .* pytorch_model.bin"):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_a_file_of_another_name_may_be_renamed(form, tmp_path):
    write_weights(tmp_path, hub_folders.tensors(CONFIG), form, 0)
    (tmp_path / SINGLE[form]).rename(tmp_path / f"mine{Path(SINGLE[form]).suffix}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"holds mine\..* rename it to {SINGLE[form]}"):
        open_checkpoint(tmp_path, CONFIG)


def test_names_of_another_trainer_are_shown(tmp_path):
    values = {f"module.{name}": tensor for name, tensor in hub_folders.tensors(CONFIG).items()}
    write_weights(tmp_path, values, "safetensors", 0)
    with pytest.raises(
        CheckpointError, match=r"lacks model\.embed.* and holds module\.lm_head.* save it under the names"
    ):
        open_checkpoint(tmp_path, CONFIG)


def test_a_tied_head_has_a_sentence_of_its_own(tmp_path):
    values = hub_folders.tensors(CONFIG)
    del values["lm_head.weight"]
    write_weights(tmp_path, values, "safetensors", 0)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight; .* where it was tied to the embedding"):
        open_checkpoint(tmp_path, CONFIG)


def test_the_settings_that_autogptq_wrote_beside_are_to_be_copied(tmp_path):
    values = hub_folders.tensors(CONFIG) | {UP.replace("weight", "qweight"): torch.zeros(4, 48).int()}
    write_weights(tmp_path, values, "safetensors", 0)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(CheckpointError, match="copy the settings of quantize_config.json into config.json"):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_shards_without_their_index_are_refused(form, tmp_path):
    shard = SINGLE[form].replace(".", "-00001-of-00002.")
    (tmp_path / shard).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{shard} without {SINGLE[form]}.index.json, .* download that too"):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_a_tensor_in_two_shards_is_refused(form, tmp_path):
    values = hub_folders.tensors(CONFIG)
    where = write_weights(tmp_path, values, form, shards=2)
    other = ({*where.values()} - {where[UP]}).pop()
    names = [name for name in where if where[name] == other]
    hub_folders.save(tmp_path / other, {name: values[name] for name in [*names, UP]})
    with pytest.raises(CheckpointError, match=f"holds {UP} twice, in "):
        open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_an_index_that_says_something_else_is_refused(form, tmp_path):
    where = write_weights(tmp_path, hub_folders.tensors(CONFIG), form, shards=2)
    other = ({*where.values()} - {where[UP]}).pop()
    for changed, message in [
        ({**where, UP: other}, f"says that {other} holds {UP} and {where[UP]} does"),
        ({**where, "extra": other}, f"says that {other} holds extra and no file does"),
        ({**where, UP: SHARD[form].format(3, 3)}, "which is missing"),
        ({}, "no weight_map"),
        ({UP: 3}, "no weight_map"),
        ("text", "no weight_map"),
    ]:
        write_index(tmp_path, form, changed)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path, CONFIG)


@both_formats
def test_an_index_cannot_point_outside_the_folder(form, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    where = write_weights(inside, hub_folders.tensors(CONFIG), form, shards=2)
    stolen = where[UP]
    (inside / stolen).rename(tmp_path / stolen)
    for target in (f"../{stolen}", str(tmp_path / stolen), f"..\\{stolen}", "..", "", "a\0b"):
        write_index(inside, form, {name: target if shard == stolen else shard for name, shard in where.items()})
        with pytest.raises(CheckpointError, match="a shard is a file of the same folder"):
            open_checkpoint(inside, CONFIG)


@both_formats
def test_a_single_file_beside_an_index_is_refused(form, tmp_path):
    write_weights(tmp_path, hub_folders.tensors(CONFIG), form)
    write_weights(tmp_path, hub_folders.tensors(CONFIG), form, shards=2)
    with pytest.raises(CheckpointError, match="remove the one that is out of date"):
        open_checkpoint(tmp_path, CONFIG)
