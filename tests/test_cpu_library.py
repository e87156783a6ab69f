"""How the library of the C kernels comes to be, and what computes where it cannot."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import threading

import golden_sessions
import pytest

from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.executors.cpu.library import FLAGS, compiled, library
from baichuan.executors.cpu.reference import ReferenceOps

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_a_compiler_is_asked_once(tmp_path, monkeypatch):
    """Threads that come at once have one library, and a later one compiles nothing."""
    paths, runs, run = [], [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: runs.append(command) or run(command, **kw))
    threads = [threading.Thread(target=lambda: paths.append(compiled(tmp_path, FLAGS))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and [path.name for path in tmp_path.iterdir()] == [paths[0].name]
    ctypes.CDLL(str(paths[0]))
    runs.clear()
    assert compiled(tmp_path, FLAGS) == paths[0] and all("--version" in command for command in runs)
    assert compiled(tmp_path, (*FLAGS, "-O1")) != paths[0]


def test_a_cache_that_cannot_be_written_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/baichuan cannot be written \(Not a directory\); set XDG_CACHE_HOME to"):
        compiled(tmp_path / "file/baichuan", FLAGS)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", ""])
def test_without_a_compiler_pytorch_computes(tmp_path, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not compiler:
        monkeypatch.setenv("PATH", "")
    library.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "baichuan"):
            session = golden_sessions.session("v1_7b", kind=CpuExecutor)
            session.generate([[5, 6]], golden_sessions.GREEDY, 2)
        assert type(session.executor.ops) is ReferenceOps
        assert len([r for r in caplog.messages if "matrix products run in PyTorch" in r]) == 1
        assert not list(tmp_path.rglob("*.so"))
    finally:
        library.cache_clear()
