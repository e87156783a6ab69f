"""How many threads compute, by flag, by environment and by default."""

from __future__ import annotations

import os
import subprocess

import psutil
import pytest
import scripts
import torch

from baichuan.errors import ConfigError
from baichuan.executors.cpu import threads as cpu_threads
from baichuan.executors.cpu.threads import use_threads


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("physical", "allowed", "ranks", "expected"),
    [(8, 16, 1, 8), (8, 16, 2, 4), (8, 3, 1, 3), (8, 16, 3, 2), (2, 4, 5, 1), (None, 4, 1, 4), (64, 1, 2, 1)],
)
def test_the_default_is_a_share_of_the_physical_cores(monkeypatch, caplog, physical, allowed, ranks, expected):
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(os, "cpu_count", lambda: allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    with caplog.at_level("INFO", "baichuan"):
        use_threads(None, ranks)
    assert torch.get_num_threads() == expected
    assert ("--bind-to none" in caplog.text) == ((physical, ranks) == (64, 2))


@pytest.mark.parametrize(("threads", "warned"), [(4, False), (5, True)])
def test_more_threads_than_cores_are_warned_of(monkeypatch, caplog, threads, warned):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    use_threads(threads, 1)
    assert ("threads 5 on 4 cores take turns" in caplog.text) == warned


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch):
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(cpu_threads, "default_threads", lambda ranks: pytest.fail("not asked for"))
    use_threads(None, 1)
    assert torch.get_num_threads() == 3
    use_threads(2, 1)
    assert torch.get_num_threads() == 2


def test_no_threads_are_refused():
    with pytest.raises(ConfigError, match="threads 0 is not in 1 to"):
        use_threads(0, 1)


def test_the_flag_arrives(tmp_path):
    engine = scripts.built(tmp_path / "engine", "v1_7b")
    given = scripts.run_flags(engine, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)

    def run(threads):
        program = scripts.script("run.py", [*given, "--threads", threads])
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    done, refused = run("1"), run("0")
    assert done.returncode == 0 and "on the CPU with 1 threads" in done.stderr, done.stderr
    assert refused.returncode == 2 and "threads 0 is not in 1 to" in refused.stderr
