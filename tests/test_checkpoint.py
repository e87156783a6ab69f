"""Checkpoints in the hub's format: what is read, that it is read lazily, and where the folder comes from."""

from __future__ import annotations

import ctypes
import fnmatch
import json
import logging
import struct
from dataclasses import replace
from pathlib import Path

import goldens
import hub_folders
import huggingface_hub.constants
import pytest
import torch
from goldens import VERSIONS_WITH_GOLDENS
from hub_folders import SINGLE, both_formats, small_config, write_weights
from safetensors.torch import load_file

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint, read_model_config, resolve_folder
from baichuan.weights.shard import hub_shapes

CONFIG = small_config("v2_7b")
UP = "model.layers.1.mlp.up_proj.weight"


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
