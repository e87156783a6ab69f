"""Kill the scripts that write at random instants, and look at what they leave: python -m tests.kill --kills 200"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before PyTorch is imported

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from tests.fuzz.__main__ import SHARED_MEMORY, preload
from tests.fuzz.pool import in_child
from tests.kill.writers import WRITERS, Writer, leftovers_hold

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
NOT_BEGUN = 70  # exit code of a child that the signal met before the script
RUN_S = 180.0  # for a run that nobody kills
WAIT_S = 10.0  # for a process to end, and for its workers to be gone


def start(writer: Writer, number: int, folder: Path) -> int:
    """The process of run 0 or 1, in a session of its own."""
    process = os.fork()
    if process:
        return process
    code = NOT_BEGUN
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        names = {"in": folder / "in", "out": folder / "out"}
        code = writer.main([each.format(**names) for each in writer.runs[number].split()])
        sys.stdout.flush()
    except BaseException:  # what Python would print as a traceback
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int, limit_s: float) -> int:
    """Exit code of a process that must end in time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"did not end within {limit_s:g} s")


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has just ended
            continue
        if int(own) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def leftovers(folder: Path) -> list[str]:
    out = folder / "out"
    return [str(path.relative_to(out)) for path in out.rglob("*") if leftovers_hold(out, path)]


def kill(writer: Writer, folder: Path, chance: Random, seconds: float, whole: list) -> str:
    """Kill run 1 at a random instant; returns what became of it.  Raises AssertionError for what must not be."""
    by, before = chance.choice(SIGNALS), set(leftovers(folder))  # of earlier kills
    process = start(writer, chance.randrange(2), folder)
    time.sleep(chance.uniform(0, 1.1 * seconds))
    os.kill(process, by)
    code = wait(process, WAIT_S + 2 * seconds)
    said = (folder / "output").read_text(errors="replace")
    deadline = time.monotonic() + WAIT_S
    while (alive := members(process)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive, f"{by.name}: processes {alive} live on"
    assert "Traceback" not in said or "run_script" not in said, f"{by.name}: {said[-1500:]}"
    begun = code not in (-by, NOT_BEGUN)  # the signal came before the script began
    assert code == 0 or not begun or (code == 2 and by != signal.SIGKILL), f"{by.name}: exit code {code}: {said}"
    assert writer.final(writer.content(folder / "out"), whole), f"{by.name}: the content is neither old nor new"
    assert by == signal.SIGKILL or not begun or set(leftovers(folder)) <= before, f"{by.name}: left {leftovers(folder)}"
    return "finished" if code == 0 else by.name


def attack(writer: Writer, kills: int, folder: Path, seed: str) -> tuple[Counter, list[str]]:
    """Kills of one writer: what became of them, and what must not be."""
    whole, seconds = [], 0.0
    for number in (0, 1):
        start_s = time.monotonic()
        assert wait(start(writer, number, folder), RUN_S) == 0, (folder / "output").read_text()
        seconds = time.monotonic() - start_s
        whole.append(writer.content(folder / "out"))
    became, faults = Counter(), []
    for number in range(kills):
        try:
            became[kill(writer, folder, Random(f"{seed}/{writer.name}/{number}"), seconds, whole)] += 1
        except Exception as error:  # a reader's exception is a fault as well
            became["fault"] += 1
            faults.append(f"{writer.name}, kill {number} of seed {seed}: {type(error).__name__}: {error}")
    time.sleep(0.3)  # an unfinished file is young for so long
    assert wait(start(writer, 1, folder), RUN_S) == 0, (folder / "output").read_text()
    if left := leftovers(folder):
        faults.append(f"{writer.name}: the next run left {left}")
    return became, faults


def make(writers: list[Writer], folders: dict[str, Path]) -> None:
    for writer in writers:
        (folders[writer.name] / "in").mkdir(parents=True)
        (folders[writer.name] / "out").mkdir()
        writer.make(folders[writer.name] / "in")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument("--seed", default="1", help="the same seed draws the same instants (default: 1)")
    parser.add_argument("--writer", action="append", choices=[each.name for each in WRITERS], help="only this one")
    args = parser.parse_args()
    writers = [each for each in WRITERS if not args.writer or each.name in args.writer]
    total, faults = sum(writer.share for writer in writers), []
    base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kill-", dir=base) as scratch:
        folders = {writer.name: Path(scratch) / str(number) for number, writer in enumerate(writers)}
        in_child(partial(make, writers, folders))
        preload()
        for writer in writers:
            kills = -(-args.kills * writer.share // total)
            became, found = attack(writer, kills, folders[writer.name], args.seed)
            faults += found
            print(f"{writer.name:16} {kills:4} kills: {dict(became)}", flush=True)
    for fault in faults:
        print(f"FAULT: {fault}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
