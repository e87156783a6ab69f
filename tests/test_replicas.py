"""Several replicas of an engine under mpirun: one queue, one file of results, whoever is free works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import scripts
from test_batch import GREEDY, VERSION, check_goldens, flags, golden_rows, results, write_rows

from baichuan.errors import ConfigError
from baichuan.parallel.comm import machines_of
from baichuan.parallel.replicas import groups_of


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return {size: scripts.built(folder / str(size), VERSION, size) for size in (1, 2)}


def machines(*sizes: int) -> list[str]:
    """mpirun's arguments for ranks that take themselves for those of machines of these sizes."""
    words: list[str] = []
    for number, size in enumerate(sizes):
        for rank in range(size):
            words += [":"] if words else []
            words += ["-n", "1", "env", f"OMPI_COMM_WORLD_LOCAL_RANK={rank}", f"MACHINE={number}", "PROGRAM"]
    return words


def start(program: list[str], *sizes: int) -> list[str]:
    """mpirun over machines of these numbers of ranks."""
    words: list[str] = []
    for word in machines(*sizes):
        words += program if word == "PROGRAM" else [word]
    return [str(scripts.MPIRUN), "--oversubscribe", "--allow-run-as-root", *words]


def run_on(program: list[str], cwd, *sizes: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        start(program, *sizes), env=scripts.ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=cwd
    )


def run_each(*programs: list[str]) -> subprocess.CompletedProcess:
    """One rank for each program, all of one world."""
    words = [word for program in programs for word in (":", "-n", "1", *program)][1:]
    command = [str(scripts.MPIRUN), "--oversubscribe", "--allow-run-as-root", *words]
    return subprocess.run(command, env=scripts.ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_the_ranks_of_a_replica_are_of_one_machine():
    assert groups_of([[0, 1, 2, 3]], 2) == [[0, 1], [2, 3]]
    assert groups_of([[0, 2], [1, 3]], 2) == [[0, 2], [1, 3]], "mpirun --map-by node"
    with pytest.raises(ConfigError, match="machine 1 runs 1 rank and .* 2 of one machine; .* slots=2"):
        groups_of([[0, 1], [2]], 2)
    with pytest.raises(ConfigError, match="runs 3 ranks and .* takes 2; start a multiple of 2 .mpirun -n 2, "):
        groups_of([[0, 1, 2]], 2)


def test_machines_of_one_name_are_told_apart_by_places_that_occur_twice():
    assert machines_of([("a", 0), ("a", 1), ("b", 0)]) == [[0, 1], [2]]
    assert machines_of([("pod", 0), ("pod", 1), ("pod", 0), ("pod", 1)]) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("size", "on"),
    [
        pytest.param(1, (2,), id="2 x 1"),
        pytest.param(2, (4,), id="2 x 2"),
        pytest.param(1, (3,), id="3 x 1"),
        pytest.param(2, (2, 2), id="2 x 2, two machines"),
    ],
)
def test_replicas_make_what_one_rank_makes(engines, tmp_path, size, on):
    rows = golden_rows(6)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    done = run_on(scripts.script("run.py", flags(engines[size], prompts, out, *GREEDY)), tmp_path, *on)
    assert done.returncode == 0, done.stderr
    check_goldens(results(out), rows)
    assert done.stderr.count("24 prompts, 576 new tokens") == 1, "rank 0 alone says what was done"


def test_places_on_two_machines(tmp_path):
    """GPUs go by the place on the machine, of which each machine counts its own."""
    program = """from baichuan.parallel.comm import world_of_this_process
from baichuan.parallel.replicas import join_replica
import os
comm = world_of_this_process()
alone = join_replica(comm, 1)
assert (alone.comm.world_size, alone.comm.local_rank, alone.count) == (1, comm.local_rank, 4), alone
assert type(alone.comm).__name__ == "Solo", "one rank alone sends no messages"
own = join_replica(comm, 2)
words = [comm.rank, os.environ["MACHINE"], own.comm.rank, own.comm.world_size, own.comm.local_rank, own.comm.local_size]
print(*words, own.count, flush=True)"""
    done = run_on([sys.executable, "-c", program], scripts.ROOT, 2, 2)
    expected = {"0 0 0 2 0 2 2", "1 0 1 2 1 2 2", "2 1 0 2 0 2 2", "3 1 1 2 1 2 2"}
    assert done.returncode == 0 and set(done.stdout.splitlines()) == expected, done.stderr


def test_a_machine_with_half_a_replica_is_refused(engines, tmp_path):
    prompts, out = write_rows(tmp_path / "p.jsonl", golden_rows(1)), tmp_path / "out.jsonl"
    done = run_on(scripts.script("run.py", flags(engines[2], prompts, out)), tmp_path, 2, 1)
    found = scripts.sentences(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(found) == 3
    assert all("machine 1 runs 1 rank and each replica of the engine takes 2" in line for line in found)


@pytest.fixture(scope="module")
def others(engines, tmp_path_factory):
    """Other engines for as many ranks, a folder that is none, and one engine's copy."""
    folder = tmp_path_factory.mktemp("others")
    made = {size: scripts.built(folder / str(size), "v2_13b", size) for size in (1, 2)}
    return made | {"none": folder / "none", "copy": shutil.copytree(engines[1], folder / "copy")}


@pytest.mark.parametrize(
    ("first", "other", "what"),
    [
        pytest.param(1, 1, "is another engine than", id="replicas"),
        pytest.param(2, 2, "is another engine than", id="one replica"),
        pytest.param(1, "none", "config.json cannot be read", id="missing"),
    ],
)
def test_ranks_with_different_engines_are_refused(engines, others, tmp_path, first, other, what):
    """As on two machines, one of which has an old copy, or none."""
    prompts, out = write_rows(tmp_path / "p.jsonl", golden_rows(1)), tmp_path / "out.jsonl"
    started_s = time.monotonic()
    done = run_each(*[scripts.script("run.py", flags(each, prompts, out)) for each in (engines[first], others[other])])
    found = scripts.sentences(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not out.exists(), done.stderr
    assert sorted(line.split("(rank ")[1][0] for line in found) == ["0", "1"] and all(what in line for line in found)
    assert "without calling" not in done.stderr and time.monotonic() - started_s < 60


def test_replicas_take_copies_of_one_engine(engines, others, tmp_path):
    rows = golden_rows(2)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    folders = engines[1], others["copy"]
    done = run_each(*[scripts.script("run.py", flags(each, prompts, out, *GREEDY)) for each in folders])
    assert done.returncode == 0, done.stderr
    check_goldens(results(out), rows)


SLOW = """import sys, time
import run
from baichuan.generation.in_flight import InFlight
from baichuan.parallel.comm import world_of_this_process
rank, step = world_of_this_process().rank, InFlight.step
def slow(self):
    time.sleep(SLEEP if rank == 1 else 0)
    return step(self)
InFlight.step = slow
from baichuan.parallel.replicas import Asker
tell = Asker.tell
def counted(self, news):
    if not isinstance(news, str):
        print("rank 1 made", len(news), flush=True)
    tell(self, news)
Asker.tell = counted
sys.exit(run.main(sys.argv[1:]))"""


def made_by_rank_1(out: str) -> int:
    return sum(int(line.split()[-1]) for line in out.splitlines() if line.startswith("rank 1 made"))


@pytest.mark.parametrize(
    ("sleep_s", "low", "high"),
    [pytest.param(0.01, 0.3, 0.7, id="even", marks=pytest.mark.slow), pytest.param(0.1, 0.0, 0.3, id="slow")],
)
def test_uneven_work_balances(engines, tmp_path, sleep_s, low, high):
    """A replica that takes much longer for each step gets fewer prompts, and as many as the other if it does not."""
    rows = golden_rows(16)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    program = SLOW.replace("SLEEP if rank == 1 else 0", f"{sleep_s} if rank == 1 else 0.01")
    done = run_on([sys.executable, "-c", program, *flags(engines[1], prompts, out, *GREEDY)], scripts.ROOT, 2)
    assert done.returncode == 0, done.stderr
    check_goldens(results(out), rows)
    assert low < made_by_rank_1(done.stdout) / len(rows) < high


def test_a_replica_that_dies_ends_the_run_and_resume_finishes_it(engines, tmp_path):
    rows = golden_rows(100)
    prompts, out = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    program = SLOW.replace("SLEEP", "0.01").replace(
        "return step(self)", "print('pid', rank, os.getpid(), flush=True); return step(self)"
    )
    command = [sys.executable, "-c", "import os\n" + program, *flags(engines[1], prompts, out, *GREEDY)]
    process = subprocess.Popen(
        start(command, 2),
        env=scripts.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=scripts.ROOT,
    )
    for line in process.stdout:
        words = line.split()
        if words[:2] == ["pid", "1"] and out.exists() and out.read_bytes().count(b"\n") >= 8:
            os.kill(int(words[2]), signal.SIGKILL)
            break
    _, err = process.communicate(timeout=60)
    kept = out.read_bytes().count(b"\n")
    assert process.returncode != 0 and 8 <= kept < len(rows)
    assert any("another rank has ended; what was finished is in" in line for line in scripts.sentences(err)), err
    assert all(isinstance(json.loads(line), dict) for line in out.read_bytes().splitlines(keepends=True)[:kept])
    again = scripts.script("run.py", flags(engines[1], prompts, out, *GREEDY, "--resume"))
    assert run_on(again, tmp_path, 2).returncode == 0
    check_goldens(results(out), rows)
