"""A process and its children, timed, with the most memory that they held."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.1


@dataclass(frozen=True)
class Measured:
    """The result of a process."""

    code: int | None  # exit code; None = it was ended at its time limit
    output: str  # both streams, as they came
    seconds: float
    host_bytes: int  # the most that the processes held together, without pages of files
    gpu_bytes: int  # the most in use on all GPUs together, less what was in use before; 0 without a GPU


def run(argv: Sequence[str], folder: Path, timeout_s: float) -> Measured:
    """Run the program in `folder` in its own process group, which is killed after timeout_s seconds."""
    start, peak = time.perf_counter(), 0
    with (
        GpuWatch() as gpus,
        subprocess.Popen(
            list(map(str, argv)),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
        reader.start()
        code = None
        try:
            while (code := process.poll()) is None and time.perf_counter() - start < timeout_s:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(SAMPLE_S)
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - start
        reader.join(5)
    return Measured(code, "".join(lines), seconds, peak, gpus.peak)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of the process and its descendants; shared pages are counted once per process."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            status = Path("/proc", str(each.pid), "status").read_text()
            total += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))
    except (psutil.Error, OSError):
        pass  # it has ended meanwhile
    return total


class GpuWatch:
    """The most memory in use on all visible GPUs together, less that at the beginning, as nvidia-smi reports it."""

    COMMAND = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]

    def __init__(self):
        self.peak, self._used, self._first = 0, {}, {}
        self._process = None

    def __enter__(self) -> GpuWatch:
        if shutil.which("nvidia-smi"):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            command = [*self.COMMAND, *(["-i", visible] if visible else [])]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            index, _, used = line.partition(",")
            if not used.strip().isdigit():
                continue
            self._used[index] = int(used) << 20
            self._first.setdefault(index, self._used[index])
            self.peak = max(self.peak, sum(self._used.values()) - sum(self._first.values()))

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
