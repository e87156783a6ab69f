"""One case, in a child process: change a copy of the good files, call the script, judge what it did."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

from baichuan.text.printable import UNSAFE
from tests.fuzz.guard import Guard
from tests.fuzz.mutate_files import OUTSIDE, make_devices
from tests.fuzz.targets import IN, OUT, Target

TIME_LIMIT_S = 20.0
MEMORY_LIMIT = 1 << 30  # growth of resident memory, in bytes
MAX_SHOWN = 4000
IN_OPEN, IN_NONBLOCK = 0x20, 0x800  # from linux/inotify.h and fcntl.h
# A sentence of the scripts on standard error, or argparse's; at a small size no input may exhaust the memory.
SENTENCE = re.compile(r"^[\w.]+( \d+)?: error[:( ]")
EXHAUSTED = "memory is exhausted"


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    code: int
    seconds: float
    growth: int  # growth of resident memory, in bytes
    fault: str  # empty: accepted or refused as it should be
    done: str = ""  # what was changed
    argv: tuple[str, ...] = ()
    output: str = ""


class Runner:
    """Runs cases of one target in this process, in a folder of its own."""

    def __init__(self, target: Target, good: Path, folder: Path):
        self.target, self.good, self.folder = target, good, folder
        self.work = folder / "work"
        self.guard, self.watch = Guard(folder), _Watch()
        sys.argv = [f"{target.main.__module__.rpartition('.')[2]}.py"]  # what messages call the script
        self.streams = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("stdout", "stderr")]

    def run(self, seed: str, number: int) -> Result:
        chance = Random(f"{seed}/{self.target.name}/{number}")
        os.chdir(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.good, self.work, copy_function=shutil.copyfile)
        (self.work / OUT).mkdir()
        os.chdir(self.work / OUT)  # where a relative path leads
        make_devices(self.work)
        done, argv = self.target.mutate(chance, self.work)
        before = _snapshot(self.work / OUT)
        links = any(path.is_symlink() for path in (self.work / IN).rglob("*"))
        self.watch.begin(self.work / OUTSIDE)
        self.guard.broken.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        resident, start = _status("VmRSS"), time.monotonic()
        code, failure = self._call(argv)
        seconds, growth = time.monotonic() - start, _status("VmHWM") - resident
        output, errors = (self._read(stream) for stream in self.streams)
        fault = failure or judge(code, output, errors, verbose=not self.target.files or argv[-1:] == ["info"])
        if self.guard.broken:
            fault = f"outside of its folder: {self.guard.broken[0]}"
        if self.watch.opened() and not fault and self.target.files and not links:
            fault = "a file outside the folder was opened"
        if not fault and code == 2 and _snapshot(self.work / OUT) - before:
            fault = f"left behind: {sorted(_snapshot(self.work / OUT) - before)[:5]}"
        if not fault and seconds > TIME_LIMIT_S:
            fault = f"took {seconds:.1f} s"
        if not fault and growth > MEMORY_LIMIT:
            fault = f"took {growth / 1e9:.2f} GB of memory"
        shown = f"{output[-MAX_SHOWN:]}\n--- standard error\n{errors[-MAX_SHOWN:]}" if fault else ""
        return Result(code, seconds, growth, fault, done, tuple(argv), shown)

    def _call(self, argv: list[str]) -> tuple[int, str]:
        """Exit code, and the traceback of what was not caught."""
        for stream in self.streams:
            os.ftruncate(stream, 0)
            os.lseek(stream, 0, os.SEEK_SET)
        standard_input = self.work / IN / self.target.stdin if self.target.stdin else Path(os.devnull)
        with _redirected(self.streams, standard_input if standard_input.is_file() else Path(os.devnull)):
            try:
                return self.target.main(argv), ""
            except SystemExit as error:
                return (error.code if isinstance(error.code, int) else 1), ""
            except BaseException:  # what Python would print as a traceback
                return 1, traceback.format_exc()

    def _read(self, stream: int) -> str:
        return os.pread(stream, 1 << 20, 0).decode("utf-8", "surrogateescape")


def judge(code: int, output: str, errors: str, verbose: bool) -> str:
    """What is wrong with the answer, or nothing.  verbose: other lines may stand before the sentence."""
    if "Traceback" in errors or "Exception ignored" in errors:
        return "a traceback was printed"
    if UNSAFE.search(output) or UNSAFE.search(errors):
        return "a control character was printed"
    lines = [line for line in errors.split("\n") if line]
    sentences = [line for line in lines if SENTENCE.match(line)]
    if code == 0:
        return "" if verbose or not lines else f"accepted, with {lines[0][:200]!r} on standard error"
    if code == 1:
        return "" if lines and "is required" in lines[-1] else "exit code 1"
    if code != 2:
        return f"exit code {code}"
    if len(sentences) != 1 or sentences[0] != lines[-1] or (len(lines) > 1 and not verbose):
        return f"{len(lines)} lines on standard error instead of one sentence"
    if EXHAUSTED in lines[-1]:
        return "memory was exhausted"
    return "" if len(lines[-1]) < MAX_SHOWN else f"a sentence of {len(lines[-1])} characters"


class _redirected:
    """Standard input, output and error go to these files."""

    def __init__(self, streams: list[int], standard_input: Path):
        self.targets = [os.open(standard_input, os.O_RDONLY), *streams]

    def __enter__(self) -> None:
        sys.stdout.flush()
        self.saved = [os.dup(number) for number in range(3)]
        for number, target in enumerate(self.targets):
            os.dup2(target, number)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)

    def __exit__(self, *_) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, saved in enumerate(self.saved):
            os.dup2(saved, number)
            os.close(saved)
        os.close(self.targets[0])


class _Watch:
    """Notices that one of somebody else's files is opened.  One for all cases: to close it takes the kernel 10 ms."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)
        self.handle = self.libc.inotify_init1(IN_NONBLOCK)

    def begin(self, folder: Path) -> None:
        self.opened()
        if self.handle >= 0:
            self.libc.inotify_add_watch(self.handle, os.fsencode(folder), IN_OPEN)

    def opened(self) -> bool:
        """Whether one was opened since this was last asked."""
        found = b""
        while self.handle >= 0:
            try:
                found += os.read(self.handle, 1 << 16)
            except OSError:  # no more of them
                break
        return b"secret" in found


def _snapshot(folder: Path) -> set[str]:
    """Files, and folders that are being filled; an empty folder that a flag names may be made before a refusal."""
    paths = folder.rglob("*") if folder.is_dir() else ()
    return {str(path.relative_to(folder)) for path in paths if path.name.startswith(".") or not path.is_dir()}


def _status(name: str) -> int:
    """A size of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, name
    return int(found[1]) << 10
