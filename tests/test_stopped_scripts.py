"""Builds and generations that go wrong in the middle, by a full disk or a signal, leave what was there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
import scripts
from scripts import refused
from tiny_engine import snapshot

import build
import run
from baichuan.executors import torch_backend
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.generation import token_files
from baichuan.util.publishing import staged_folder

VERSION = "v1_7b"


def test_an_output_that_nobody_reads(engine):
    reader, writer = os.pipe()
    os.close(reader)
    command = scripts.script("run.py", scripts.text_flags(engine, VERSION, "--input_text", "The river"))
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=scripts.ENVIRONMENT, timeout=60)
    os.close(writer)
    err = done.stderr.decode()
    assert done.returncode == 2 and "nobody reads the output" in scripts.sentences(err)[0], err
    assert "Traceback" not in err and "Exception ignored" not in err, err


def test_a_full_disk_leaves_the_old_engine(engine, prompts, tmp_path, capsys, monkeypatch):
    shutil.copytree(engine, tmp_path / "engine")
    before, original = snapshot(tmp_path / "engine"), torch_backend.write_tensors

    def full(path, plan, *more):
        if "rank1" in path.name:
            raise OSError(28, "No space left on device", str(path))
        original(path, plan, *more)

    monkeypatch.setattr(torch_backend, "write_tensors", full)
    given = scripts.build_flags(tmp_path / "engine", "v2_13b", "--world_size", "2")
    refused(build.main, given, "No space left on device; free space", capsys)
    assert snapshot(tmp_path / "engine") == before
    assert run.main(scripts.run_flags(tmp_path / "engine", prompts, tmp_path)) == 0


def test_a_full_disk_leaves_the_old_results(engine, prompts, tmp_path, capsys, monkeypatch):
    (tmp_path / "logits.npy").write_bytes(b"old")

    def full(write, _):
        write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_files, "write_array", full)
    refused(run.main, scripts.run_flags(engine, prompts, tmp_path), "No space left on device", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.csv", "logits.npy", "prompts.csv"]
    assert (tmp_path / "logits.npy").read_bytes() == b"old"


def test_ctrl_c_during_the_imports(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr("baichuan.parallel.comm.world_of_this_process", stopped)
    refused(run.main, ["--max_output_len", "1"], "stopped by Ctrl-C", capsys)


def interrupted(command: list[str], ready, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """Exit code and standard error of a program that gets the signal, of Ctrl-C or another, once ready() holds."""
    process = subprocess.Popen(
        command, env=scripts.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + 30
    while not ready(process) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(by)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, err.decode()


@pytest.mark.parametrize("parallel", [[], ["--parallel_build", "--world_size", "2"]], ids=["serial", "parallel"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_the_old_engine(engine, tmp_path, parallel, by):
    """The build is of 1.4 GB of dummy weights, of which a few MB are written; its processes end with it."""
    shutil.copytree(engine, tmp_path / "engine")
    before = snapshot(tmp_path / "engine")
    given = ["--model_version", "v1_7b", "--n_layer", "2", "--output_dir", str(tmp_path / "engine"), "--no_self_check"]

    def writing(_) -> bool:
        return any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".engine.building-*/*.engine"))

    code, err = interrupted(scripts.script("build.py", [*given, *parallel]), writing, by)  # reads what workers write
    if by == signal.SIGKILL:
        assert code == -signal.SIGKILL and list(tmp_path.glob(".engine.building-*"))
        with staged_folder(tmp_path / "engine"):  # as the next build's
            pass
    else:
        sentence = "stopped by Ctrl-C" if by == signal.SIGINT else "stopped by SIGTERM"
        assert code == 2 and sentence in scripts.sentences(err)[0] and "Traceback" not in err, err
    assert snapshot(tmp_path / "engine") == before and not list(tmp_path.glob(".engine.building-*"))


def test_ctrl_c_during_a_conversation(engine):
    command = scripts.script("run.py", scripts.text_flags(engine, VERSION, "--chat"))
    code, err = interrupted(command, lambda process: b"lists the commands" in (process.stdout.read() or b""))
    assert code == 2 and "stopped by Ctrl-C" in scripts.sentences(err)[0] and "Traceback" not in err, err


def test_ctrl_c_during_a_generation_leaves_no_results(engine, prompts, tmp_path, capsys, monkeypatch):
    original, steps = ReferenceExecutor.forward, []

    def forward(self, step):
        steps.append(step)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(ReferenceExecutor, "forward", forward)
    refused(run.main, scripts.run_flags(engine, prompts, tmp_path), "stopped by Ctrl-C", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.csv"]
