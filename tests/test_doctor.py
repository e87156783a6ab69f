"""python -m baichuan.doctor: each fault is found, and said with its remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

from baichuan import doctor
from baichuan.executors import device
from baichuan.kernels import argmax
from baichuan.util.nvidia import driver_gpus

ROOT = Path(__file__).resolve().parents[1]
GPU = "NVIDIA H200, 550.54"


def findings(check, *given) -> list[tuple[str, str]]:
    """Level and sentence of each finding."""
    found = list(check(*given))
    assert all(finding.remedy for finding in found if finding.level == "fault")
    return [(finding.level, finding.text) for finding in found]


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "level"), [((3, 9, 19), "fault"), ((3, 10, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fault")]
)
def test_python(version, level):
    assert [found for found, _ in findings(doctor.check_python, version)] == [level]


@pytest.mark.parametrize(
    ("wanted", "level", "sentence"),
    [
        (["numpy>=1", "psutil"], "ok", "2, all in"),
        (["numpy<1"], "fault", "numpy is "),
        (["no-such-package"], "fault", "no-such-package is missing"),
        (["numpy", "no-such-package; python_version < '3'", "no-such-package; extra == 'dev'"], "ok", "1, all in"),
    ],
)
def test_packages(monkeypatch, wanted, level, sentence):
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    [(found, text)] = findings(doctor.check_packages)
    assert found == level and text.startswith(sentence)


def test_packages_of_a_project_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-project")
    [(level, text)] = findings(doctor.check_packages)
    assert level == "note" and "no-such-project" in text


def test_pytorch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    [(level, text)] = findings(doctor.check_gpus)
    assert level == "fault" and text.startswith("cannot be imported")


def too_old() -> None:
    raise RuntimeError("driver too old.\nupdate it")


@pytest.mark.parametrize(
    ("seen", "cuda", "visible", "level", "sentence"),
    [
        ([], None, None, "note", "no NVIDIA GPU or driver"),
        ([GPU], None, None, "fault", f"{GPU} is there and this PyTorch ({torch.__version__}) is built for the CPU"),
        ([GPU], "13.0", None, "fault", f"{GPU} is there and PyTorch ({torch.__version__}) sees none (driver too old)"),
        ([GPU], "13.0", "", "note", f"{GPU}: hidden by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use(monkeypatch, seen, cuda, visible, level, sentence):
    for module in (doctor, device):
        monkeypatch.setattr(module, "driver_gpus", lambda: seen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    [_, (found, text)] = findings(doctor.check_gpus)
    assert found == level and text.startswith(sentence)


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [((7, 5), "(float16)"), ((8, 0), "(float16, bfloat16, INT8)"), ((9, 0), "(float16, bfloat16, INT8, FP8)")],
)
def test_a_gpu_and_what_it_multiplies(monkeypatch, capability, precisions):
    def fails(_):
        raise RuntimeError("Failed to find C compiler\nmore")

    facts = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "a GPU",
        "get_device_capability": capability,
        "mem_get_info": (70e9, 80e9),
    }
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(doctor, "launch_kernel", lambda _: None)
    _, (level, text) = findings(doctor.check_gpus)
    assert level == "ok" and text.startswith("0: a GPU, 70.0 of 80.0 GB free") and precisions in text
    monkeypatch.setattr(doctor, "launch_kernel", fails)
    _, (level, text) = findings(doctor.check_gpus)
    assert level == "fault" and text.endswith("a kernel does not run (RuntimeError: Failed to find C compiler)")


def test_the_kernel_that_is_tried(monkeypatch):
    device = "cuda:0" if torch.cuda.is_available() else "cpu"  # where Triton interprets it
    doctor.launch_kernel(device)
    monkeypatch.setattr(argmax, "argmax", lambda logits: torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="came out as number"):
        doctor.launch_kernel(device)


def test_what_the_driver_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "nvidia-smi", f"echo '{GPU}'")
    assert driver_gpus() == [GPU]
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert GPU not in driver_gpus() and "NVIDIA-SMI has failed" not in driver_gpus()


def test_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert findings(doctor.check_compiler, False)[0][0] == "note"
    assert findings(doctor.check_compiler, True)[0][0] == "fault"
    program(tmp_path, "cc", "")
    assert findings(doctor.check_compiler, True) == [("ok", str(tmp_path / "cc"))]


def test_where_compiled_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/made"))
    assert findings(doctor.check_cache) == [("ok", f"compiled kernels are kept in {tmp_path}/not/made/baichuan")]
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert findings(doctor.check_cache)[0][0] == "note"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert findings(doctor.check_cache) == [("note", "no home folder, in which compiled kernels could be kept")]


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    level, text = findings(doctor.check_tensorrt)[0]
    assert level == "note" and text.endswith("only --backend tensorrt_rtx needs it")


def test_mpi_works_here():
    [(level, text)] = findings(doctor.check_mpi)
    assert level == "ok" and "agree (Open MPI" in text


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            '[ $1 = --version ] && echo Other MPI && exit; shift 2; "$@"; "$@"',
            "of two processes each thinks it is alone",
        ),
        ("echo no network interface >&2; exit 1", "do not work together: no network interface"),
    ],
    ids=["another MPI", "broken"],
)
def test_an_mpirun_that_does_not_work(monkeypatch, tmp_path, body, sentence):
    program(tmp_path, "mpirun", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    [(level, text)] = findings(doctor.check_mpi)
    assert level == "fault" and sentence in text


def test_no_mpirun(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert findings(doctor.check_mpi)[0][0] == "note"


def test_room(monkeypatch, tmp_path):
    usage = namedtuple("usage", "available total free")
    for free, levels in ((40e9, ["ok", "ok"]), (5e9, ["note", "note"])):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: usage(free, 2 * free, 0))
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        assert [level for level, _ in findings(doctor.check_room, tmp_path)] == levels


def test_a_check_that_fails_is_a_fault(monkeypatch):
    def check_room():
        raise OSError("no such disk")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_room,))
    assert doctor.main() == 1


def test_the_program(tmp_path):
    """Its exit code and its lines, with a broken mpirun and with none of it."""
    program(tmp_path, "mpirun", "exit 1")
    command = [sys.executable, "-m", "baichuan.doctor"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "\nfault MPI" in done.stdout and re.search(r"\n\d+ faults?\n", done.stdout)
    assert done.stdout.splitlines()[0].startswith("ok    Python")
    assert "-> source .venv/bin/activate" in done.stdout and not done.stderr
