"""Checkpoints in the hub's format: what is read, that it is read lazily, and everything that is refused."""

from __future__ import annotations

import ctypes
import fnmatch
import json
import logging
import os
import struct
from dataclasses import replace
from pathlib import Path

import goldens
import hub_folders
import huggingface_hub.constants
import pytest
import torch
from goldens import VERSIONS_WITH_GOLDENS
from hub_folders import SHARD, SINGLE, small_config, write_index, write_weights
from safetensors.torch import load_file

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint, read_model_config, resolve_folder
from baichuan.weights.shard import hub_shapes

CONFIG = small_config("v2_7b")
UP = "model.layers.1.mlp.up_proj.weight"
both_formats = pytest.mark.parametrize("form", SINGLE)


def read(source, block: int = 7) -> torch.Tensor:
    """The whole tensor, block of rows by block of rows."""
    return torch.cat([source.read(a, min(a + block, source.shape[0])) for a in range(0, source.shape[0], block)])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as the libraries' own loaders read them."""
    values = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            values |= load_file(path)
        elif path.suffix == ".bin":
            values |= torch.load(path, weights_only=True)
    return values


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("version", VERSIONS_WITH_GOLDENS)
def test_the_goldens_files_are_read_whole_and_exactly(version):
    folder = goldens.checkpoint(version)
    config = read_model_config(folder, version, "float32")
    found, expected = open_checkpoint(folder, config), stored(folder)
    assert any("inv_freq" in name for name in expected) == (version == "v1_7b")  # the stray ones are there to ignore
    assert set(found) == set(hub_shapes(config)) == {name for name in expected if "inv_freq" not in name}
    for name, source in found.items():
        assert (source.shape, source.dtype) == (tuple(expected[name].shape), expected[name].dtype)
        assert read(source).equal(expected[name]), name
        assert source.read(source.shape[0], source.shape[0]).shape == (0, *source.shape[1:])


@pytest.mark.parametrize("shards", [0, 3])
@both_formats
def test_every_layout_is_read(form, shards, tmp_path):
    expected = hub_folders.tensors(CONFIG)
    write_weights(tmp_path, expected, form, shards)
    found = open_checkpoint(tmp_path, CONFIG)
    assert all(read(found[name]).equal(expected[name]) for name in expected)


def test_safetensors_win_over_bin_and_that_is_said(tmp_path, caplog):
    expected = hub_folders.tensors(CONFIG)
    write_weights(tmp_path, expected, "safetensors")
    write_weights(tmp_path, {name: values + 1 for name, values in expected.items()}, "bin", shards=2)
    with caplog.at_level(logging.INFO):
        folder = resolve_folder(str(tmp_path))
    assert "both model.safetensors and pytorch_model.bin.index.json; reading model.safetensors" in caplog.text
    assert read(open_checkpoint(folder, CONFIG)[UP]).equal(expected[UP])


# ---------------------------------------------------------------- tensors


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


# ---------------------------------------------------------------- files


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


# ---------------------------------------------------------------- memory


def anonymous_bytes() -> int:
    """This process's memory that is no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def write_sparse(folder: Path, form: str, config) -> None:
    """A checkpoint of zeros that takes no disk."""
    if form == "bin":
        with torch.serialization.skip_data():
            values = {name: torch.empty(shape, dtype=torch.float16) for name, shape in hub_shapes(config).items()}
            torch.save(values, folder / SINGLE[form])
        return
    header, end = {}, 0
    for name, shape in hub_shapes(config).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with open(folder / SINGLE[form], "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@both_formats
def test_reading_a_large_checkpoint_keeps_nothing_in_memory(form, tmp_path):
    config = replace(CONFIG, hidden_size=1024, vocab_size=1 << 16)  # 2 tensors of 134 MB and smaller ones
    write_sparse(tmp_path, form, config)
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again and not be seen
    before, peak, total = anonymous_bytes(), 0, 0
    for source in open_checkpoint(tmp_path, config).values():
        step = (1 << 19) // torch.Size(source.shape[1:]).numel()
        for start in range(0, source.shape[0], step):
            rows = source.read(start, min(start + step, source.shape[0]))
            total += rows.float().count_nonzero().item() + rows.nbytes
            peak = max(peak, anonymous_bytes() - before)
    assert total > 268e6
    assert peak < 32e6  # blocks of 2 MB in float32 and the allocator's slack
    kept = read(open_checkpoint(tmp_path, config)["lm_head.weight"], 4096)
    assert anonymous_bytes() - before > 100e6 and kept.count_nonzero() == 0  # a kept copy would be seen


# ---------------------------------------------------------------- where the folder comes from

READ = ["config.json", "generation_config.json", "tokenizer.model"]
NOT_READ = ["tokenizer_config.json", "modeling_baichuan.py", "configuration_baichuan.py", "handler.py", "README.md"]
BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
SAFE = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    "weights, expected", [(BIN, BIN), (SAFE, SAFE), ([*BIN, *SAFE], SAFE)], ids=["bin", "safe", "both"]
)
def test_a_hub_id_downloads_one_format_and_no_code(weights, expected, tmp_path, monkeypatch):
    def download(repo_id, allow_patterns):
        assert repo_id == "baichuan-inc/Some-Model"
        for name in READ + NOT_READ + weights:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_folder("baichuan-inc/Some-Model") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {*READ, *expected}


def test_offline_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"baichuan-inc/none is no folder here and cannot be downloaded") as error:
        resolve_folder("baichuan-inc/none")
    assert "\n" not in str(error.value)


def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    for name in ("missing", "./missing/folder", str(tmp_path / "missing"), "", "a/b/c"):
        with pytest.raises(CheckpointError, match="is neither a folder nor a hub id"):
            resolve_folder(name)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"is a file; give the folder that holds it, {tmp_path}"):
        resolve_folder(str(tmp_path / "file"))


@pytest.mark.parametrize("above", [".", "models--b--c", "models--b--c/snapshots"])
def test_a_folder_above_the_checkpoint_names_it(above, tmp_path):
    snapshot = tmp_path / "models--b--c/snapshots/0abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "baichuan"}')
    folder = tmp_path / above
    (folder / "an_engine").mkdir()
    (folder / "an_engine/config.json").write_text('{"baichuan": {}}')  # newer, and not what is wanted
    if above == ".":
        snapshot.rename(tmp_path / "mine")
        snapshot = tmp_path / "mine"
    with pytest.raises(CheckpointError, match=f"is a folder above {snapshot.name}; give {snapshot}"):
        resolve_folder(str(folder))
