"""Children that run cases, some at a time: one that hangs or crashes is ended, counted, and replaced."""

from __future__ import annotations

import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.case import TIME_LIMIT_S, Result, Runner
from tests.fuzz.targets import Target

BATCH = 100  # cases of one child; a fork takes as long as a case
ADDRESS_SPACE = 6 << 30  # beyond what a child starts with: a runaway ends before the machine does
GRACE_S = 5.0  # a child that is that much beyond the limit is ended


@dataclass
class Child:
    """A process that runs cases first, first + 1, ..., and reports each."""

    target: Target
    first: int
    stop: int
    process: int
    pipe: int
    folder: Path
    since: float = field(default_factory=time.monotonic)
    received: bytes = b""


class Pool:
    """Runs cases in at most `jobs` children."""

    def __init__(self, goods: dict[str, Path], scratch: Path, seed: str, jobs: int, keep: Path | None = None):
        """keep: a folder for the one case that is run, whose files stay"""
        self.goods, self.scratch, self.seed, self.jobs, self.keep = goods, scratch, seed, jobs, keep
        self.children: list[Child] = []

    def run(self, batches: Iterator[tuple[Target, int, int]]) -> Iterator[tuple[Target, int, Result]]:
        """(target, number, result) of every case.  batches: target, first number, number after the last."""
        batches = iter(batches)
        try:
            while True:
                while len(self.children) < self.jobs and (batch := next(batches, None)):
                    self.children.append(self._start(*batch))
                if not self.children:
                    return
                yield from self._collect()
        finally:
            for child in self.children:
                _end(child)

    def _collect(self) -> Iterator[tuple[Target, int, Result]]:
        ready, _, _ = select.select([child.pipe for child in self.children], [], [], 1.0)
        for child in list(self.children):
            if child.pipe in ready:
                data = os.read(child.pipe, 1 << 20)
                child.received += data
                yield from self._results(child)
                if not data:
                    yield from self._ended(child)
            elif time.monotonic() - child.since > TIME_LIMIT_S + GRACE_S:
                _end(child)
                yield from self._ended(child, f"still running after {TIME_LIMIT_S + GRACE_S:g} s")

    def _results(self, child: Child) -> Iterator[tuple[Target, int, Result]]:
        while len(child.received) >= 4 and len(child.received) >= (size := int.from_bytes(child.received[:4], "big")):
            result = pickle.loads(child.received[4:size])
            child.received = child.received[size:]
            number, child.first, child.since = child.first, child.first + 1, time.monotonic()
            yield child.target, number, result

    def _ended(self, child: Child, fault: str = "") -> Iterator[tuple[Target, int, Result]]:
        """The child has gone; a case that it began is a failure, and another child takes the rest."""
        self.children.remove(child)
        os.close(child.pipe)
        status = os.waitpid(child.process, 0)[1]
        if child.first < child.stop:
            seconds = time.monotonic() - child.since
            code = os.waitstatus_to_exitcode(status)
            tail = (child.folder / "stderr").read_bytes()[-4000:].decode("utf-8", "replace")
            yield (
                child.target,
                child.first,
                Result(code, seconds, 0, fault or f"the process died ({code})", output=tail),
            )
            if child.first + 1 < child.stop:
                self.children.append(self._start(child.target, child.first + 1, child.stop))
        if not self.keep:
            shutil.rmtree(child.folder, ignore_errors=True)

    def _start(self, target: Target, first: int, stop: int) -> Child:
        folder = self.keep or Path(tempfile.mkdtemp(prefix="child-", dir=self.scratch))
        reader, writer = os.pipe()
        sys.stdout.flush()
        process = os.fork()
        if process:
            os.close(writer)
            return Child(target, first, stop, process, reader, folder)
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.setpgid(0, 0)
            os.close(reader)
            _limit_memory()
            runner = Runner(target, self.goods[target.name], folder)
            for number in range(first, stop):
                content = pickle.dumps(runner.run(self.seed, number))
                _write(writer, (len(content) + 4).to_bytes(4, "big") + content)
            os._exit(0)
        except BaseException:  # a fault of these tests
            (folder / "stderr").write_text(traceback.format_exc())
        finally:
            os._exit(1)


def _write(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end(child: Child) -> None:
    for end in (os.killpg, os.kill):
        try:
            end(child.process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def in_child(work: Callable[[], None]) -> None:
    """Call work() in a process of its own, so that this one starts no threads."""
    process = os.fork()
    if not process:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise SystemExit("the good files could not be made")
