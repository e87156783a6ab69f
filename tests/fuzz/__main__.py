"""Run cases and print a table: python -m tests.fuzz --cases 100000
Repeat one and keep its files: python -m tests.fuzz --seed SEED --target NAME --case NUMBER --keep FOLDER"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before PyTorch is imported

import argparse
import gc
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from tests.fuzz.case import Result
from tests.fuzz.good import outside
from tests.fuzz.mutate_files import OUTSIDE
from tests.fuzz.pool import BATCH, Pool, in_child
from tests.fuzz.targets import IN, TARGETS, Target

SHARED_MEMORY = Path("/dev/shm")
PROGRESS_S = 60.0


class Tally:
    """What became of a target's cases."""

    def __init__(self) -> None:
        self.cases = self.accepted = self.refused = self.failures = self.growth = 0
        self.seconds = self.total_s = 0.0

    def add(self, result: Result) -> None:
        self.cases += 1
        self.failures += bool(result.fault)
        self.accepted += not result.fault and result.code == 0
        self.refused += not result.fault and result.code != 0
        self.seconds, self.growth = max(self.seconds, result.seconds), max(self.growth, result.growth)
        self.total_s += result.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases (default: 1000)")
    parser.add_argument("--seed", default="1", help="the same seed gives the same cases (default: 1)")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be given again")
    parser.add_argument("--case", type=int, help="only this case of the one target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: cores)")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures (default: a temporary one)")
    args = parser.parse_args()
    targets = [TARGETS[name] for name in args.target or TARGETS]
    if args.case is not None and len(targets) != 1:
        parser.error("--case needs one --target")
    keep = args.keep or Path(tempfile.mkdtemp(prefix="fuzz-failures-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as scratch:
        goods = {target.name: Path(scratch) / "good" / str(number) for number, target in enumerate(targets)}
        in_child(partial(make_good, targets, goods))
        preload()
        if args.case is not None:
            return repeat(targets[0], goods, Path(scratch), args, keep)
        return run_all(targets, goods, Path(scratch), args, keep)


def preload() -> None:
    """Import what the scripts import late, so that not every child does."""
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import baichuan.cli.generate
    import baichuan.hf_model.modeling  # noqa: F401
    from baichuan.evaluation.rouge import Rouge

    Rouge()
    gc.collect()
    gc.freeze()  # a child's collection would copy the memory that it shares with this process


def make_good(targets: list[Target], goods: dict[str, Path]) -> None:
    for target in targets:
        folder = goods[target.name]
        (folder / IN).mkdir(parents=True)
        target.make(folder / IN)
        outside(folder / OUTSIDE)


def run_all(targets: list[Target], goods: dict[str, Path], scratch: Path, args: argparse.Namespace, keep: Path) -> int:
    tallies = {target.name: Tally() for target in targets}
    counts = share_out(targets, args.cases)
    print(f"seed {args.seed}, {args.cases} cases, failures are kept in {keep}", flush=True)
    pool, start = Pool(goods, scratch, args.seed, args.jobs), time.monotonic()
    next_s, complete = start + PROGRESS_S, True
    try:
        for target, number, result in pool.run(batches(targets, counts)):
            if result.fault.startswith(("still running", "took", "the process died")):  # a busy machine is no fault
                result = again(target, number, goods, scratch, args)
            tallies[target.name].add(result)
            if result.fault:
                show(target, number, result, args.seed, keep)
            if time.monotonic() > next_s:
                next_s += PROGRESS_S
                done = sum(each.cases for each in tallies.values())
                print(f"{done} cases, {done / (time.monotonic() - start):.1f} a second", flush=True)
    except KeyboardInterrupt:
        complete = False
    print(table(tallies, time.monotonic() - start), flush=True)
    failures = sum(each.failures for each in tallies.values())
    if not complete:
        print("stopped before the end", flush=True)
    if not failures:
        shutil.rmtree(keep, ignore_errors=True)
    return 1 if failures or not complete else 0


def again(target: Target, number: int, goods: dict[str, Path], scratch: Path, args: argparse.Namespace) -> Result:
    """The case once more, alone: what it does now counts."""
    pool = Pool(goods, scratch, args.seed, 1)
    return next(pool.run(iter([(target, number, number + 1)])))[2]


def repeat(target: Target, goods: dict[str, Path], scratch: Path, args: argparse.Namespace, keep: Path) -> int:
    """One case, whose files stay in the folder `keep`."""
    keep.mkdir(parents=True, exist_ok=True)
    pool = Pool(goods, scratch, args.seed, 1, keep)  # in a child: a guard stays as long as its process
    _, _, result = next(pool.run(iter([(target, args.case, args.case + 1)])))
    show(target, args.case, result, args.seed, keep)
    return 1 if result.fault else 0


def share_out(targets: list[Target], cases: int) -> dict[str, int]:
    """Cases by target, by the targets' shares; at least one each."""
    total = sum(target.share for target in targets)
    counts = {target.name: max(1, int(cases * target.share / total)) for target in targets}
    counts[targets[0].name] += max(0, cases - sum(counts.values()))
    return counts


def batches(targets: list[Target], counts: dict[str, int]) -> Iterator[tuple[Target, int, int]]:
    """Every target's cases in turn, so that a run that is stopped has seen all of them."""
    begun = dict.fromkeys(counts, 0)
    while any(begun[name] < counts[name] for name in counts):
        for target in targets:
            first = begun[target.name]
            begun[target.name] = min(counts[target.name], first + BATCH)
            if first < begun[target.name]:
                yield target, first, begun[target.name]


def show(target: Target, number: int, result: Result, seed: str, keep: Path) -> None:
    command = f"python -m tests.fuzz --seed {seed} --target {target.name!r} --case {number} --keep FOLDER"
    what = f"FAILURE: {result.fault.strip().splitlines()[-1][:300]}" if result.fault else "no failure"
    print(f"\n{what}  ({command})")
    text = f"{command}\n{result.done}\n{result.argv}\nexit code {result.code}\n{result.fault}\n{result.output}\n"
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{target.name}-{number}.txt".replace("/", "_")).write_text(text, errors="backslashreplace")
    print(f"    {result.done[:200]!r}", flush=True)


def table(tallies: dict[str, Tally], seconds: float) -> str:
    whole = Tally()
    for each in tallies.values():
        for name in ("cases", "accepted", "refused", "failures", "total_s"):
            setattr(whole, name, getattr(whole, name) + getattr(each, name))
        whole.seconds, whole.growth = max(whole.seconds, each.seconds), max(whole.growth, each.growth)
    names = ("cases", "accepted", "refused", "failures", "worst s", "worst MB", "mean ms")
    rows = [f"{'target':30}" + "".join(f" {name:>9}" for name in names)]
    for name, each in [*tallies.items(), ("all", whole)]:
        mean = 1000 * each.total_s / max(each.cases, 1)
        rows.append(
            f"{name:30} {each.cases:9} {each.accepted:9} {each.refused:9} {each.failures:9} {each.seconds:9.2f} "
            f"{each.growth / 1e6:9.0f} {mean:9.1f}"
        )
    return "\n".join(["", *rows, f"{whole.cases / max(seconds, 1e-9):.1f} cases a second"])


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what Python would print
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at an orderly exit libraries complain of what gc.freeze keeps
