"""A skip whose reason nobody named fails the run that asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from named_skips import NO_RELEASED_TOKENIZERS

MODULES = {
    "named": f"def test_it(): pytest.skip({NO_RELEASED_TOKENIZERS!r})",
    "expected": "@pytest.mark.xfail\ndef test_it(): assert False",
    "inside": "def test_it(): pytest.skip('no reason')",
    "whole": "pytest.skip('no reason', allow_module_level=True)",
    "marked": "@pytest.mark.skip(reason='no reason')\ndef test_it(): ...",
}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_other_skips_fail(workers, tmp_path):
    for name, text in MODULES.items():
        (tmp_path / f"test_{name}.py").write_text(f"import pytest\n{text}\ndef test_well(): ...\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, *sys.path[1:])))}

    def outcome(*flags: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "named_skips", "-n", workers, *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert outcome()[0] == 0
    assert outcome("--only_named_skips", "test_named.py", "test_expected.py")[0] == 0
    code, out = outcome("--only_named_skips")
    others = {line.split(".py")[0] for line in out.splitlines() if line.endswith(": no reason")}
    assert code == 1 and others == {"test_inside", "test_whole", "test_marked"}, out
