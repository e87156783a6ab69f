"""Scripts as processes that were started in odd ways: closed or full streams, other encodings, no temporary folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import goldens
import pytest
import tiny_engine

import summarize
from baichuan.cli import common
from baichuan.engine.folder import read_engine
from baichuan.text.printable import UNSAFE

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, str(ROOT / "run.py"), "--max_output_len", "2", "--device", "cpu", "--log_level", "error"]
TEXT = ["--tokenizer_dir", str(goldens.checkpoint("v1_7b"))]
DOCTOR = [sys.executable, "-m", "baichuan.doctor"]
CLOSED = "<&- >&- 2>&-"


def shell(command: list[str], streams: str, **variables: str) -> subprocess.CompletedProcess:
    """streams: redirections."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    line = ["bash", "-c", f'exec "$@" {streams}', "bash", "env", *settings, *command]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and not UNSAFE.search(done.stderr), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def engine() -> str:
    return str(tiny_engine.engine("v1_7b").folder)


def test_text_that_the_output_s_encoding_lacks_is_spelled_out(engine):
    command = [*RUN, "--engine_dir", engine, "--input_text", "世界", *TEXT]
    done = shell(command, "", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and not done.stderr, done
    assert r"\u4e16\u754c" in done.stdout


def test_a_build_without_standard_streams(tmp_path):
    source, out = goldens.checkpoint("v1_7b"), tmp_path / "x"
    command = [sys.executable, str(ROOT / "build.py"), "--model_dir", str(source), "--output_dir", str(out)]
    assert shell([*command, "--device", "cpu", "--no_self_check"], CLOSED).returncode == 0
    read_engine(out)


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path):
    program = "from baichuan.util.streams import open_streams; open_streams(); import sys; "
    program += f"file = open({str(tmp_path / 'x')!r}, 'w'); file.write(str(file.fileno())); print('?', file=sys.stderr)"
    assert shell([sys.executable, "-c", program], CLOSED).returncode == 0
    assert (tmp_path / "x").read_text() == "3"


@pytest.mark.parametrize(("output", "why"), [(">/dev/full", "No space left"), ("> >(true)", "Broken pipe")])
def test_what_nobody_can_read(output, why):
    assert f"the output is cut off ({why}" in one_sentence(shell(DOCTOR, output))


def test_a_report_on_a_full_disk(engine, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"article": "Rain fell.", "highlights": "Rain."}\n')
    summary = [
        "--test_trt_llm",
        "--engine_dir",
        engine,
        "--dataset_path",
        str(tmp_path / "a.jsonl"),
        "--max_ite",
        "1",
        *TEXT,
    ]
    assert summarize.main([*summary, "--output_len", "2", "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    command = [sys.executable, "-m", "baichuan.evaluation.report", str(tmp_path / "results.json")]
    assert shell(command, "").stdout.startswith(" ")
    assert one_sentence(shell(command, ">/dev/full")).startswith("report: error: the output is cut off")


def test_no_folder_for_temporary_files(engine, tmp_path):
    """As where every disk is full."""
    program = "import tempfile, sys; tempfile._candidate_tempdir_list = lambda: []; import run; sys.exit(run.main())"
    command = [sys.executable, "-c", program, "--engine_dir", engine, "--max_output_len", "2"]
    error = one_sentence(shell(command, ""))
    assert "PyTorch cannot be loaded" in error and "No usable temporary directory" in error


def test_a_package_that_cannot_be_loaded(capsys):
    def body(args, comm):
        raise ImportError("tokenizers.so: failed to map segment", name="tokenizers.tokenizers")

    assert common.run_script(common.Parser("x"), [], body) == common.USER_ERROR
    assert "error: tokenizers cannot be loaded (tokenizers.so: failed" in capsys.readouterr().err


def test_a_modules_own_fault_is_no_package_that_is_missing():
    def body(args, comm):
        raise ImportError("cannot import name x", name="baichuan.x")

    with pytest.raises(ImportError):
        common.run_script(common.Parser("x"), [], body)


def test_a_chat_whose_input_cannot_be_read(tmp_path):
    command = [*RUN, "--engine_dir", str(tiny_engine.engine("v2_13b").folder), "--chat", "--tokenizer_dir"]
    command += [str(goldens.checkpoint("v2_13b"))]
    assert "standard input cannot be read" in one_sentence(shell(command, f"0> {tmp_path / 'x'}"))
