"""Two hundred mutated inputs of every script; `make fuzz CASES=100000` tries as many as you like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.case import judge
from tests.fuzz.mutate_formats import BY_NAME, mutated

ROOT = Path(__file__).resolve().parents[1]
CASES = 200


@pytest.mark.timeout(300)
def test_every_case_is_accepted_or_refused_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES), "--seed", "CI", "--jobs", "2"]
    done = subprocess.run([*command, "--keep", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    (whole,) = [line.split() for line in done.stdout.splitlines() if line.startswith("all ")]
    cases, accepted, refused, failures = map(int, whole[1:5])
    assert cases >= CASES and accepted > cases // 20 and refused > cases // 3 and failures == 0


def test_one_case_again_keeps_its_files(tmp_path):
    one = ["--seed", "CI", "--target", "run with .csv", "--case", "3", "--keep", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *one], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no failure" in done.stdout and not done.stderr, done
    assert (tmp_path / "work/in/p.csv").is_file() and (tmp_path / "stdout").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_leave_the_old_content_or_the_new():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", "--kills", "24"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert done.stdout.count(" kills: ") == 11 and "SIGKILL" in done.stdout and "FAULT" not in done.stdout


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((0, "text\n", "", False), ""),
        ((2, "", "run.py: error: no; give one\n", False), ""),
        ((2, "", "warned\nrun.py: error: no; give one\n", True), ""),
        ((2, "", "warned\nrun.py: error: no; give one\n", False), "2 lines"),
        ((2, "", "run.py: error: a\nrun.py: error: b\n", True), "2 lines"),
        ((2, "", "", False), "0 lines"),
        ((1, "", "", False), "exit code 1"),
        ((-11, "", "", False), "exit code -11"),
        ((0, "\x1b[31m", "", False), "control character"),
        ((0, "", "careful\n", False), "accepted, with"),
        ((2, "", "Traceback (most recent call last):\n", True), "traceback"),
        ((2, "", "run.py: error: the host memory is exhausted; use a smaller batch\n", False), "memory"),
    ],
)
def test_the_verdict(answer, fault):
    found = judge(*answer)
    assert fault in found and bool(found) == bool(fault)


@pytest.mark.parametrize("name", [*BY_NAME, ".other"])
def test_the_same_seed_gives_the_same_damage_and_nearly_all_of_it_is_some(name):
    content = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode() * 20
    found = [mutated(Random(seed), f"x{name}", content) for seed in range(40)]
    assert found == [mutated(Random(seed), f"x{name}", content) for seed in range(40)]
    assert sum(each != content for each in found) >= 30
