"""What a build takes of the disk and of memory: it is asked for first, and little of it is held at a time."""

import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import scripts
import tiny_engine
import torch
from process_memory import peak_anonymous_bytes

import build
from baichuan.engine import builder
from baichuan.errors import UnsupportedError

VERSION = "v1_7b"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, which the engine of 11.5 MB does not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if not done or done.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_named_with_numbers(small_disk, capsys):
    assert build.main(scripts.build_flags(small_disk / "engine", VERSION, "--log_level", "error")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"needs 0.01 GB on the disk of {small_disk / 'engine'} and 0.01 GB are free" in line
    assert not list((small_disk / "engine").iterdir())


def test_a_disk_that_becomes_full(small_disk, capsys, monkeypatch):
    monkeypatch.setattr(builder, "_require_resources", lambda *_: None)
    assert build.main(scripts.build_flags(small_disk / "engine", VERSION, "--log_level", "error")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "engine: No space left on device; free space or choose another folder" in line
    assert not list((small_disk / "engine").iterdir())


def test_resources_are_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UnsupportedError, match=r"needs 0\.\d\d GB on the disk"):
        tiny_engine.build(tmp_path / "a", VERSION)
    monkeypatch.undo()
    monkeypatch.setattr(builder, "PROCESS_BYTES", 1 << 50)
    with pytest.raises(UnsupportedError, match="host memory"):
        tiny_engine.build(tmp_path / "a", VERSION)
    assert not list((tmp_path / "a").iterdir())


def test_an_engine_that_no_gpu_here_can_run_is_refused_or_warned_of(tmp_path, monkeypatch, caplog):
    """A sequence must fit; of those that may run at once some can wait, where the KV cache is paged."""
    caplog.set_level(logging.INFO, logger="baichuan")  # a script that ran before in this process may have raised it
    long, many = dict(max_input_len=1 << 20), dict(max_batch_size=4096, max_input_len=1 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as small:
        small.setattr(builder, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=1 << 26)))
        tiny_engine.build(tmp_path / "a", VERSION, **long)  # it may run elsewhere
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "GB when it runs a single sequence and this machine has" in warning
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 26, 1 << 26))
    with pytest.raises(UnsupportedError, match="a single sequence and the GPU has 0.07 GB; use more ranks"):
        tiny_engine.build(tmp_path / "b", VERSION, **long)
    assert not list((tmp_path / "b").iterdir())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    tiny_engine.build(tmp_path / "c", VERSION, **many)
    assert "the GPU has 85.90 GB: as many sequences run at once as fit, and the others wait" in caplog.text
    with pytest.raises(UnsupportedError, match="at full size and the GPU has"):
        tiny_engine.build(tmp_path / "d", VERSION, **many, backend="tensorrt_rtx")


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in /proc")
@pytest.mark.parametrize(
    ("more", "least", "most"),
    [
        ([], 0.2e9, 1.2e9),  # PyTorch, the dummy weights' pool, what writers hold: 0.8 to 1.04; the engine has 1.45 GB
        pytest.param(
            ["--use_weight_only", "--weight_only_precision", "int4", "--world_size", "2", "--parallel_build"],
            0.4e9,
            2.0e9,  # two processes; in float32 the one layer and a head have 1.9 GB
            marks=pytest.mark.slow,
        ),
    ],
    ids=["float16", "int4 in two processes"],
)
def test_a_build_streams(tmp_path, more, least, most):
    """With one layer of the released sizes, anonymous memory stays below the weights'."""
    out = tmp_path / "engine"
    given = ["--model_version", VERSION, "--n_layer", "1", "--backend", "torch", "--no_self_check", *more]
    try:
        peak = peak_anonymous_bytes(scripts.script("build.py", [*given, "--output_dir", str(out)]))
    finally:
        shutil.rmtree(out, ignore_errors=True)  # gigabytes, which pytest would keep
    assert least < peak < most, f"{peak / 1e9:.2f} GB"
