"""Kill the scripts that write at random instants, and look at what they leave: python -m tests.kill --kills 200"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before PyTorch is imported

import argparse
import shutil
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

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TWICE_S = 0.05  # a second signal follows within this time, after one in four
LAST_PART = 0.3  # half of the signals come in this last share of a run
FINISHED, EARLY = "finished", "not begun"  # outcomes of a run that a signal reached too late, or too early
MAX_TRIES = 20  # signals for a kill
NOT_BEGUN = 70  # exit code of a child that the signal met before the script
RUN_S = 180.0  # for a run that nobody kills
WAIT_S = 10.0  # for a process to end, and for its workers to be gone


def start(writer: Writer, number: int, folder: Path) -> int:
    """The process of run 0 or 1, in a session of its own; returns when the script begins."""
    begun, beginning = os.pipe()
    process = os.fork()
    if process:
        os.close(beginning)
        os.read(begun, 1)
        os.close(begun)
        return process
    code = NOT_BEGUN
    try:
        os.close(begun)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        names = {"in": folder / "in", "out": folder / "out"}
        os.close(beginning)
        sys.argv = [sys.argv[0], *(each.format(**names) for each in writer.runs[number].split())]
        code = writer.main()  # as the script calls it: what it does while it leaves is the process's own
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


def kill(writer: Writer, folder: Path, chance: Random, seconds: float, whole: list) -> tuple[str, float]:
    """Kill a run at a random instant.  seconds: that one takes.  Raises AssertionError for what must not be.

    Returns what became of it, and how long it lived.
    """
    by, before, content = chance.choice(SIGNALS), set(leftovers(folder)), writer.content(folder / "out")
    process = start(writer, chance.randrange(2), folder)
    place = chance.random()
    start_s = time.monotonic()
    instant = start_s + seconds * (place if chance.randrange(2) else 1 - place * LAST_PART)
    while time.monotonic() < instant and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    os.kill(process, by)
    if not chance.randrange(4):
        time.sleep(chance.random() * TWICE_S)
        os.kill(process, by)
    code, lived_s = wait(process, WAIT_S + 2 * seconds), time.monotonic() - start_s
    said = (folder / "output").read_text(errors="replace")
    deadline = time.monotonic() + WAIT_S
    while (alive := members(process)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive, f"{by.name}: processes {alive} live on"
    assert "Traceback" not in said or "run_script" not in said, f"{by.name}: {said[-1500:]}"
    begun = code not in (-by, NOT_BEGUN)  # the signal came before the script began
    assert code == 0 or not begun or (code == 2 and by != signal.SIGKILL), f"{by.name}: exit code {code}: {said}"
    assert writer.final(writer.content(folder / "out"), content, whole), f"{by.name}: neither the old content nor new"
    assert by == signal.SIGKILL or set(leftovers(folder)) <= before, f"{by.name}: left {leftovers(folder)}"
    if code == 0:
        return FINISHED, lived_s
    return (by.name if begun or by == signal.SIGKILL else EARLY), lived_s


def attack(writer: Writer, kills: int, folder: Path, seed: str) -> tuple[Counter, list[str]]:
    """Kills of one writer: what became of them, and what must not be.

    A run that has finished before its signal, or that has not begun, is none of the kills; half of the signals come in
    the last part of a run, where it writes.
    """
    whole = []
    for number in (0, 1):
        if writer.anew:
            empty(folder / "out")
        process = start(writer, number, folder)
        start_s = time.monotonic()
        assert wait(process, RUN_S) == 0, (folder / "output").read_text()
        seconds = time.monotonic() - start_s
        whole.append(writer.content(folder / "out"))
    became, faults, number = Counter(), [], 0
    while middle(became) < kills and number < MAX_TRIES * kills:
        if writer.anew and writer.content(folder / "out") == whole[0]:
            empty(folder / "out")
        try:
            found, lived_s = kill(writer, folder, Random(f"{seed}/{writer.name}/{number}"), seconds, whole)
            if found == FINISHED:
                seconds = (seconds + lived_s) / 2
        except Exception as error:  # a reader's exception is a fault as well
            found = "fault"
            faults.append(f"{writer.name}, kill {number} of seed {seed}: {type(error).__name__}: {error}")
        became[found] += 1
        number += 1
    if middle(became) < kills:
        faults.append(f"{writer.name}: of {number} signals too few came in the middle of a run")
    time.sleep(0.3)  # an unfinished file is young for so long
    assert wait(start(writer, 1, folder), RUN_S) == 0, (folder / "output").read_text()
    if left := leftovers(folder):
        faults.append(f"{writer.name}: the next run left {left}")
    return became, faults


def middle(became: Counter) -> int:
    """Signals that came in the middle of a run."""
    return became.total() - became[FINISHED] - became[EARLY]


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def make(writers: list[Writer], folders: dict[str, Path]) -> None:
    for writer in writers:
        (folders[writer.name] / "in").mkdir(parents=True)
        (folders[writer.name] / "out").mkdir()
        writer.make(folders[writer.name] / "in")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="number of kills in the middle of a run (default: 50)")
    parser.add_argument("--seed", default="1", help="the same seed draws the same instants (default: 1)")
    parser.add_argument("--writer", action="append", choices=[each.name for each in WRITERS], help="only this one")
    args = parser.parse_args()
    writers = [each for each in WRITERS if not args.writer or each.name in args.writer]
    shares, total, faults = sum(writer.share for writer in writers), Counter(), []
    base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kill-", dir=base) as scratch:
        folders = {writer.name: Path(scratch) / str(number) for number, writer in enumerate(writers)}
        in_child(partial(make, writers, folders))
        preload()
        for writer in writers:
            kills = -(-args.kills * writer.share // shares)
            became, found = attack(writer, kills, folders[writer.name], args.seed)
            faults += found
            total += became
            print(f"{writer.name:16} {middle(became):4} kills: {dict(became)}", flush=True)
    print(f"{'all':16} {middle(total):4} kills: {dict(total)}", flush=True)
    for fault in faults:
        print(f"FAULT: {fault}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
