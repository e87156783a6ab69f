"""What a command does before its work: it imports no more than it needs, and an engine is checked while it is read."""

import subprocess
import sys

import pytest
import scripts

import run
from baichuan.engine import folder as engine_folder
from baichuan.errors import EngineError
from baichuan.parallel.comm import Solo

HEAVY = ("torch", "transformers", "triton", "numpy", "huggingface_hub")


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--no_such_flag"]])
@pytest.mark.parametrize("script", ["build", "run", "summarize", "hf_baichuan_convert"])
def test_a_script_answers_without_the_libraries_that_it_runs_with(script, flags):
    program = (
        f"import sys, {script}\ntry: {script}.main({flags!r})\n"
        f"finally: print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=scripts.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_the_check_of_modules_can_fail():
    """Negative control: with the work imported, PyTorch is there."""
    program = f"import sys, baichuan.cli.generate; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=scripts.ROOT, capture_output=True, text=True)
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
