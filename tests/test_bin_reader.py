"""pytorch_model.bin: only tensors come out of it, whatever is in it, and nothing in it runs."""

from __future__ import annotations

import os
import resource
import zipfile
from pathlib import Path
from random import Random

import hub_folders
import pytest
import torch
from hub_folders import small_config

from baichuan.errors import CheckpointError
from baichuan.weights.hub.bin_reader import open_bin
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.tensor_pickle import StoredTensor
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
        ({UP: torch.zeros(3, 3).to_sparse()}, "or holds more than tensors"),
        ({UP: torch.zeros(3, device="meta")}, "or holds more than tensors"),
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


def test_every_way_of_storing_a_tensor_gives_what_torch_reads(tmp_path):
    base = torch.randn(6, 8)
    model = torch.nn.Linear(3, 2)
    values = {
        "view": base[1:5, 2:],
        "transposed": base.t(),
        "shared": base,
        "empty": torch.zeros(0, 4),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "ids": torch.arange(5),
        "parameter": model.weight,
        "float8": base.to(torch.float8_e4m3fn),
        **{f"linear.{name}": value for name, value in model.state_dict().items()},
    }
    path = tmp_path / "model.bin"
    for content in (values, model.state_dict()):
        torch.save(content, path)
        found, expected = open_bin(path), torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        for name, source in found.items():
            read = source.read(0, source.shape[0])
            assert read.dtype == expected[name].dtype and read.float().equal(expected[name].detach().float())


def rewritten(path: Path, change) -> None:
    """The archive again, stored and aligned by zipfile; change: of each record's name and content."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            entry = zipfile.ZipInfo(name)
            padding = -(archive.fp.tell() + 34 + len(name)) % 64
            entry.extra = b"\0\0" + padding.to_bytes(2, "little") + bytes(padding)
            archive.writestr(entry, change(name, content))


def test_a_record_that_is_shorter_than_its_tensor_is_found(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(64, 32), "b": torch.zeros(64, 32)}, path)
    rewritten(path, lambda name, content: content)
    assert open_bin(path)["a"].read(0, 64).eq(1).all()  # the negative control
    rewritten(path, lambda name, content: content[:-64] if name.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match="record 0 has 8128 bytes instead of 8192"):
        open_bin(path)


def with_pickle(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)


NESTED = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\x01s."  # t = (t, t), as a key
HUGE = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\x80\x01\x85R."


@pytest.mark.parametrize(
    "content",
    [NESTED, HUGE, b"\x80\x05\x96" + (6 << 30).to_bytes(8, "little") + b".", b"\x80\x02" + b")\x85" * 900_000 + b"."],
    ids=["key nested 40 deep", "bytearray called", "bytearray of 6 GiB", "nested 900,000 deep"],
)
@pytest.mark.timeout(60)
def test_a_pickle_takes_neither_time_nor_memory(content, tmp_path):
    with_pickle(tmp_path / "model.bin", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="damaged") as caught:
        open_bin(tmp_path / "model.bin")
    assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize("shape", [(2, 1 << 62), (-1, 4), (1 << 40, 3)])
def test_a_forged_shape_is_not_read(shape):
    with pytest.raises(ValueError, match="exceeds its record|damaged"):
        StoredTensor("0", torch.float32, 12, 0, shape, (4, 1))
