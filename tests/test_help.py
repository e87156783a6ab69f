"""Every program of benchmarks/ says what it is for and what each of its flags does."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef main(argv" in path.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_printed(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_the_programs_are_found():
    assert {"bench_generate", "bench_traffic", "walk", "accuracy"} <= set(PROGRAMS)
