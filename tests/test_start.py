"""What a command does before its work: it imports no more than it needs, and an engine is checked while it is read."""

import subprocess
import sys
from unittest.mock import Mock

import goldens
import pytest
import scripts

import run
from baichuan.cli.ahead import Ahead
from baichuan.engine import folder as engine_folder
from baichuan.errors import EngineError
from baichuan.parallel import launcher
from baichuan.parallel.comm import Solo
from baichuan.parallel.launcher import Launch
from baichuan.util import affinity, digest_process, manifest, nvidia
from baichuan.util.digest_process import ProcessDescriber

HEAVY = ("torch", "transformers", "triton", "numpy", "huggingface_hub")


def ran(program: str) -> subprocess.CompletedProcess:
    """The program, run by a Python of its own from the project's folder."""
    return subprocess.run([sys.executable, "-c", program], cwd=scripts.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--no_such_flag"]])
@pytest.mark.parametrize("script", ["build", "run", "summarize", "hf_baichuan_convert"])
def test_a_script_answers_without_the_libraries_that_it_runs_with(script, flags):
    program = (
        f"import sys, {script}\ntry: {script}.main({flags!r})\n"
        f"finally: print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = ran(program)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_check_of_modules_can_fail():
    """Negative control: with the work imported, PyTorch is there."""
    program = f"import sys, baichuan.cli.generate; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = ran(program)
    assert "torch" in done.stdout


@pytest.fixture
def engine(tmp_path):
    return engine_folder.read_engine(scripts.built(tmp_path / "engine", "v1_7b"))


def flip_a_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [-1, 20], ids=["among the weights", "in the table of contents"])
def test_damage_is_told_by_its_digest_though_the_file_is_read_meanwhile(engine, tmp_path, capsys, place):
    flip_a_bit(engine.rank_file(0), place)
    csv = scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,))
    assert run.main(scripts.run_flags(engine.folder, csv, tmp_path)) == 2
    assert "differs from what the build wrote (SHA-256)" in capsys.readouterr().err
    assert not (tmp_path / "ids.csv").exists()


def test_digests_that_began_ahead_are_those_that_count(engine):
    """They are taken once, and damage is found by them."""
    path, taken = engine.rank_file(0), []

    class Counted(manifest.Describer):
        def _submit(self, chunk):
            taken.append(chunk)
            super()._submit(chunk)

    with Counted(path) as describer:
        describer.begin()
        assert taken
        before = len(taken)
        with engine_folder.verified_meanwhile(engine, Solo(), {path: describer}):
            pass
        assert len(taken) == before
    flip_a_bit(path, -1)
    with Counted(path) as describer:
        describer.begin()
        with (
            pytest.raises(EngineError, match="SHA-256"),
            engine_folder.verified_meanwhile(engine, Solo(), {path: describer}),
        ):
            pass


def test_what_is_done_ahead_is_this_ranks(engine, tmp_path):
    (tmp_path / "other").mkdir()
    with Ahead([str(engine.folder), str(tmp_path / "other"), str(tmp_path / "missing")], Launch()) as ahead:
        assert list(ahead.digests) == [engine.rank_file(0)]
        assert ahead.digests[engine.rank_file(0)].entry() == engine.files[engine.rank_file(0).name]
    second = engine.folder / engine.rank_file(0).name.replace("rank0", "rank1")
    second.write_bytes(b"a second rank")
    for rank, path in ((0, engine.rank_file(0)), (1, second), (2, engine.rank_file(0)), (3, second)):
        with Ahead([str(engine.folder)], Launch(4, rank)) as ahead:
            assert list(ahead.digests) == [path]


def test_what_is_done_ahead_imports_no_torch():
    """It would wait for the import that it runs beside."""
    program = (
        "import sys; from baichuan.cli import ahead; ahead._prepare(None)\n"
        "from triton.runtime.cache import triton_key; triton_key()\n"
        "print('numpy' in sys.modules, 'sentencepiece' in sys.modules, 'torch' in sys.modules)"
    )
    done = ran(program)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


def test_digests_by_another_process_are_those_of_this_one(engine, monkeypatch):
    path = engine.rank_file(0)
    described, missing = ProcessDescriber(path), ProcessDescriber(path.with_name("missing"))
    for each in (described, missing):
        each.begin()
    assert described.entry() == engine.files[path.name]
    with pytest.raises(FileNotFoundError):
        missing.entry()
    given_up = ProcessDescriber(path)
    given_up.begin()
    given_up.close()
    assert given_up._process.returncode is not None
    monkeypatch.setattr(digest_process.subprocess, "Popen", Mock(side_effect=OSError("no more processes")))
    alone = ProcessDescriber(path)
    alone.begin()
    assert alone.entry() == engine.files[path.name]
    alone.close()


def test_a_script_has_digests_taken_by_another_process(engine, tmp_path):
    """Where PyTorch is still to be imported, and damage is told all the same."""
    given = scripts.run_flags(engine.folder, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)
    flip_a_bit(engine.rank_file(0), -1)
    program = (
        "import sys, run; from baichuan.util import digest_process; told = digest_process.ProcessDescriber.entry\n"
        "digest_process.ProcessDescriber.entry = lambda self: print('aside') or told(self)\n"
        f"print(run.main({given!r}))"
    )
    done = ran(program)
    assert done.stdout.split() == ["aside", "2"] and "SHA-256" in done.stderr, done.stdout + done.stderr


class Driver:
    """Stands for libcuda, of a machine with one GPU."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*values):
            self.calls.append(name)
            return 101 if name == "cuDeviceGet" and values[1] > 0 else 0

        call.__name__ = name
        return call


def test_the_driver_starts_a_gpu_or_says_why_not(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(nvidia.ctypes, "CDLL", lambda name: driver)
    nvidia.start_gpu(0)
    assert driver.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    with pytest.raises(OSError, match="GPU 1: cuDeviceGet gives 101"):
        nvidia.start_gpu(1)


@pytest.mark.cuda
def test_pytorch_finds_the_gpu_started():
    """Its context is the one that was made, so that memory is not taken twice."""
    program = (
        "import threading; from baichuan.util.nvidia import start_gpu\n"
        "thread = threading.Thread(target=start_gpu, args=(0,)); thread.start(); thread.join()\n"
        "import torch, ctypes; x = torch.ones(3, device='cuda').sum().item()\n"
        "driver, current, retained = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p(), ctypes.c_void_p()\n"
        "driver.cuCtxGetCurrent(ctypes.byref(current)); driver.cuDevicePrimaryCtxRetain(ctypes.byref(retained), 0)\n"
        "print(x, current.value == retained.value)"
    )
    done = ran(program)
    assert done.stdout.split() == ["3.0", "True"], done.stderr


def test_running_imports_no_hub_no_checkpoint_and_no_tensorrt(engine, tmp_path):
    given = scripts.run_flags(engine.folder, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)
    readers, plans = "baichuan.weights.hub.checkpoint", "baichuan.executors.tensorrt.api"
    needless = {"huggingface_hub", "transformers", readers, plans}
    program = f"import sys, run; code = run.main({given!r}); print(code, {needless} & set(sys.modules))"
    done = ran(program)
    assert done.stdout.splitlines()[-1] == "0 set()", done.stdout + done.stderr


def test_building_imports_no_transformers(tmp_path):
    """Nor does its self-check, whose model is of PyTorch alone."""
    given = ["--model_dir", str(goldens.checkpoint("v1_7b")), "--output_dir", str(tmp_path), "--dtype", "float32"]
    program = f"import sys, build; code = build.main({given!r}); print(code, 'transformers' in sys.modules)"
    done = ran(program)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr
    assert "self-check against the float32 weights" in done.stdout + done.stderr


COUNT = """
import gc, sys
passes = []
importing = lambda: "torch" in sys.modules and "torch.export" not in sys.modules
gc.callbacks.append(lambda *_: passes.append(importing() and gc.isenabled()))
"""


@pytest.mark.parametrize("alone", [False, True], ids=["by a script", "negative control: alone"])
def test_no_garbage_is_collected_while_pytorch_is_imported(engine, tmp_path, alone):
    given = scripts.run_flags(engine.folder, scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,)), tmp_path)
    work = "import torch" if alone else f"import run; run.main({given!r})"
    program = f"{COUNT}{work}\nprint(gc.isenabled(), sum(passes) > 0)"
    done = ran(program)
    assert done.stdout.splitlines()[-1] == f"True {alone}", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("every", "per_core", "allowed", "ranks", "left"),
    [(32, 1, 1, 2, True), (32, 2, 2, 2, True), (32, 1, 4, 2, False), (2, 1, 1, 2, False), (32, 1, 1, 1, False)],
    ids=["one core", "two threads of it", "several", "its share", "alone"],
)
def test_a_rank_leaves_the_one_core_that_it_was_bound_to(monkeypatch, every, per_core, allowed, ranks, left):
    now = set(range(allowed))
    monkeypatch.setattr(affinity.os, "cpu_count", lambda: every)
    monkeypatch.setattr(affinity.psutil, "cpu_count", lambda logical: every // per_core)
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: now)
    monkeypatch.setattr(affinity.os, "sched_setaffinity", lambda pid, to: now.update(to))
    assert affinity.leave_single_core(ranks) == left
    assert affinity.cores() == (every if left else allowed)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(1, 0, 1, 0)),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            Launch(4, 3, 2, 1),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, Launch(2, 1, 2, None)),
    ],
    ids=["alone", "Open MPI", "MPICH"],
)
def test_a_launcher_is_known_by_its_environment(monkeypatch, environment, expected):
    for name in (name for launchers in launcher.LAUNCHERS for names in launchers for name in names):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.launch() == expected


def test_a_good_file_is_used_and_another_error_stays_itself(engine, tmp_path):
    with engine_folder.verified_meanwhile(engine, Solo()):
        read = True
    assert read
    with pytest.raises(ZeroDivisionError), engine_folder.verified_meanwhile(engine, Solo()):
        raise ZeroDivisionError
    with pytest.raises(EngineError, match="no GPU"), engine_folder.verified_meanwhile(engine, Solo()):
        raise EngineError("no GPU")


def test_run_py_says_when_it_is_ready(engine, tmp_path, capsys):
    csv = scripts.prompts_csv(tmp_path / "prompts.csv", "v1_7b", (7,))
    assert run.main(scripts.run_flags(engine.folder, csv, tmp_path)) == 0
    scripts.check_outputs(tmp_path, "v1_7b", (7,))
    lines = capsys.readouterr().err.splitlines()
    ready = next(index for index, line in enumerate(lines) if line.startswith("ready in "))
    assert any("ms per step" in line for line in lines[ready:]), "the clock starts afterwards"
