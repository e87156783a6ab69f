"""A signal within a library that raises something else for it is a stop; an error long after one is an error."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan.cli import common, failures

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["run.py", "build.py", "summarize.py", "hf_baichuan_convert.py"]
# A shell's process in the background ignores Ctrl-C.
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
AT_IMPORT = f"""{HEARD}
import runpy, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name in ("argparse", "platform", "baichuan.cli"):
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""
AT_EXIT = f"{HEARD}import atexit, runpy, signal, sys; atexit.register(signal.raise_signal, signal.SIGINT); "


@pytest.mark.parametrize(
    "number, why", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), OSError("no reason")])
def test_an_exception_that_stands_for_a_signal(number, why, error, capsys):
    def body(args, comm):
        try:
            signal.raise_signal(number)
        except BaseException:  # as PyTorch's C++ does
            raise error from None

    assert common.run_script(common.Parser("x"), [], body) == common.USER_ERROR
    assert f"error: stopped by {why}; nothing unfinished was kept" in capsys.readouterr().err


def test_an_error_after_an_interrupted_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(failures, "SIGNAL_S", -1)

    def body(args, comm):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("a bug") from None

    with pytest.raises(ValueError, match="a bug"):
        common.run_script(common.Parser("x"), [], body)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def ended(program: str, script: str, handler: str = "") -> subprocess.CompletedProcess:
    program += f"{handler}sys.argv = [{script!r}, '--engine_dir', 'x', '--world_size', '-1']; "
    how = f"run_path({script!r}" if script.endswith(".py") else f"run_module({script!r}"
    command = [sys.executable, "-c", f"{program}runpy.{how}, run_name='__main__')"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", [*SCRIPTS, "baichuan.doctor"])
def test_ctrl_c_during_imports_is_no_traceback(script):
    done = ended(AT_IMPORT, script)
    assert done.returncode == -signal.SIGINT and not done.stderr, done


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_once_more_while_python_leaves_is_no_traceback(script):
    done = ended(AT_EXIT, script)
    assert done.returncode == -signal.SIGINT and done.stderr.count("\n") == 1 and "error:" in done.stderr, done


def test_ctrl_c_that_is_ignored_stays_ignored():
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); "
    assert ended(AT_EXIT, "run.py", ignore).returncode == common.USER_ERROR


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise(handler, capsys):
    def body(args, comm):
        signal.raise_signal(signal.SIGHUP)
        return 0

    before = signal.signal(signal.SIGHUP, handler)
    try:
        code = common.run_script(common.Parser("x"), [], body)
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == (0 if handler is signal.SIG_IGN else common.USER_ERROR)
    assert capsys.readouterr().err.count("stopped by SIGHUP") == (handler is not signal.SIG_IGN)


def test_a_second_signal_while_the_first_is_put_in_order(capsys):
    def body(args, comm):
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGTERM)  # ignored: it would interrupt the putting in order
            capsys.readouterr()

    assert common.run_script(common.Parser("x"), [], body) == common.USER_ERROR
    assert "stopped by SIGHUP" in capsys.readouterr().err
