"""run.py under mpirun: the goldens on several ranks, and ranks that cannot start or fail: all end, and nobody hangs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import goldens
import pytest
import scripts
import torch
from mpi_runs import FAILED_AT

from baichuan.engine.folder import read_engine
from baichuan.weights.tensor_file import read_tensors

PROGRAM = Path(__file__).resolve().parent / "support/mpi_runs.py"
END_S = 20  # after a failure, within which every rank has ended


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return scripts.built(tmp_path_factory.mktemp("engine") / "tp2", "v1_7b", 2)


def in_one_world(folder: Path, ranks: int, runs: list[list[str]], *how: str):
    """run.main for each of `runs`, by mpi_runs.py."""
    (folder / "runs.json").write_text(json.dumps(runs))
    return scripts.mpirun(ranks, scripts.script(str(PROGRAM), [str(folder / "runs.json"), *how]), folder)


@pytest.mark.parametrize(
    ("version", "tp_size"),
    [
        ("v1_7b", 2),
        ("v2_13b", 2),
        pytest.param("v1_7b", 4, marks=pytest.mark.slow),
        pytest.param("v2_13b", 5, marks=pytest.mark.slow),
    ],
)
def test_goldens_on_several_ranks(tmp_path, version, tp_size):
    folder = scripts.built(tmp_path / "engine", version, tp_size)
    given = scripts.prompts_csv(tmp_path / "prompts.csv", version)
    done = scripts.mpirun(tp_size, scripts.script("run.py", scripts.run_flags(folder, given, tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr
    scripts.check_outputs(tmp_path, version)
    assert done.stdout.count("Output: ") == len(goldens.LENGTHS)  # rank 0 alone prints


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_weight_only"],
        ["--use_weight_only", "--weight_only_precision", "int4"],
    ],
    ids=["int8", "int4"],
)
def test_quantised_engines_of_two_ranks_have_one_rank_s_numbers_and_text(tmp_path, flags):
    prompts, found = scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b"), []
    for tp_size in (1, 2):
        out = tmp_path / str(tp_size)
        engine = scripts.built(out / "engine", "v1_7b", tp_size, *flags)
        tensors = [read_tensors(read_engine(engine).rank_file(rank)) for rank in range(tp_size)]
        integers = [each[f"layers.0.down_proj.{'packed' if 'int4' in flags else 'weight'}"] for each in tensors]
        given = scripts.run_flags(engine, prompts, out)
        done = scripts.mpirun(tp_size, scripts.script("run.py", given), tmp_path)
        assert done.returncode == 0, done.stderr
        found.append((torch.cat(integers, 1), (out / "ids.csv").read_text()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_where_ranks_stand_and_what_rank_0_tells_them(tmp_path):
    program = """from baichuan.parallel.comm import world_of_this_process
comm = world_of_this_process()
told = comm.broadcast_object(f"from rank {comm.rank}")
print(f"rank {comm.rank} of {comm.world_size}, {comm.local_rank} of {comm.local_size} here, told {told}\\n", end="")"""
    done = scripts.mpirun(3, [sys.executable, "-c", program], scripts.ROOT)
    expected = {f"rank {rank} of 3, {rank} of 3 here, told from rank 0" for rank in range(3)}
    assert done.returncode == 0 and set(done.stdout.splitlines()) == expected, done.stderr


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flipped(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_rank_file_ends_every_rank(engine, tmp_path):
    """Only rank 1's file is damaged; the last run, of the whole engine, shows that the others failed for that."""
    prompts, runs = scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), []
    for damage in (missing, truncated, flipped):
        folder = tmp_path / damage.__name__
        shutil.copytree(engine, folder)
        damage(read_engine(folder).rank_file(1))
        runs.append(scripts.run_flags(folder, prompts, tmp_path))
    done = in_one_world(tmp_path, 2, [*runs, scripts.run_flags(engine, prompts, tmp_path)])
    lines = done.stdout.splitlines()
    for number, code in enumerate((2, 2, 2, 0)):
        for rank in (0, 1):
            assert f"rank {rank} run {number}: exit code {code}" in lines, done.stderr
    found = scripts.sentences(done.stderr)
    assert len(found) == 6 and "Traceback" not in done.stderr
    for words in ("is missing", "it is truncated", "it is damaged"):
        said = [line for line in found if words in line]
        assert len(said) == 2 and all("rank1.engine" in line for line in said)
        assert {"(rank 0)" in line for line in said} == {True, False}
    scripts.check_outputs(tmp_path, "v1_7b", (7,))


def test_another_number_of_ranks_ends_every_rank(tmp_path):
    engine = scripts.built(tmp_path / "engine", "v1_7b")
    given = scripts.run_flags(engine, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)
    done = scripts.mpirun(2, scripts.script("run.py", given), tmp_path)
    found = scripts.sentences(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sorted(line.split("(rank ")[1][0] for line in found) == ["0", "1"]
    assert all("was built for 1 rank and 2 are running; start it with mpirun -n 1" in line for line in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "prompts.csv"]


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_in_the_middle_ends_every_rank(engine, tmp_path, how):
    given = scripts.run_flags(engine, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)
    done = in_one_world(tmp_path, 2, [given], how)
    ended, failed = time.monotonic(), tmp_path / FAILED_AT
    assert done.returncode != 0 and ended - float(failed.read_text()) < END_S
    failed.unlink()
    assert "exit code" not in done.stdout and "Traceback" not in done.stderr
    if how == "raise":
        [sentence] = scripts.sentences(done.stderr)
        assert "error (rank 1): the fifth step fails" in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.csv", "runs.json"]
