"""pytorch_model.bin: only tensors come out of it, whatever is in it, and nothing in it runs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from random import Random

import hub_folders
import pytest
import torch
from hub_folders import small_config

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.shard import hub_shapes

CONFIG = small_config("v2_7b")
UP = "model.layers.1.mlp.up_proj.weight"


class _Runs:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_code_in_a_bin_file_is_not_run(tmp_path):
    torch.save({**hub_folders.tensors(CONFIG), "extra": _Runs(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="or holds more than tensors"):
        open_checkpoint(tmp_path, CONFIG)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file would have


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {UP: torch.zeros(1)}}, "'state_dict', a dict that is not a plain tensor"),
        ({UP: torch.zeros(3, 3).to_sparse()}, f"'{UP}', a Tensor that is not a plain tensor"),
        ({UP: torch.zeros(3, device="meta")}, "not a plain tensor"),
        ({1: torch.zeros(3)}, "holds 1, a Tensor"),
    ],
)
def test_a_bin_file_of_other_things_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, CONFIG)


def test_a_bin_file_of_old_pytorch_is_refused_with_the_way_to_convert_it(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(hub_folders.tensors(CONFIG), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"PyTorch before 1.6 .* once with torch.save\(torch.load\(FILE, weights_only=True\)"
    ):
        open_checkpoint(tmp_path, CONFIG)
    torch.save(torch.load(path, weights_only=True), path)  # the remedy works
    open_checkpoint(tmp_path, CONFIG)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_end_in_a_checkpoint_error_or_in_the_right_shapes(tmp_path):
    """A damaged pickle is a damaged program: whatever it raises must not get through."""
    path, random = tmp_path / "pytorch_model.bin", Random(0)
    torch.save(hub_folders.tensors(CONFIG), path)
    intact, refused = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    for _ in range(200):
        content = bytearray(intact)
        content[random.choice((random.randrange(entry.file_size + 200), -1 - random.randrange(2000)))] ^= (
            random.randrange(1, 256)
        )
        path.unlink()  # the last round's file may still be mapped
        path.write_bytes(content)
        try:
            found = open_checkpoint(tmp_path, CONFIG)
        except CheckpointError:
            refused += 1
        else:
            assert {name: source.shape for name, source in found.items()} == hub_shapes(CONFIG)
    assert refused > 50


def test_a_huge_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(17 << 20))
    with pytest.raises(CheckpointError, match="table of contents"):
        open_checkpoint(tmp_path, CONFIG)
