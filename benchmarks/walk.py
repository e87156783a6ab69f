"""The README's workflow from a checkpoint to a summary, every kind of command in order, each as a process:

python benchmarks/walk.py --model_version v1_7b

Makes a random checkpoint of the version at full size (--small: of the demo's size), then builds, converts, runs and
summarises in every precision.  Prints each command with its time, the most host and GPU memory that it held and the
bytes of its engine; ends non-zero at the first command that fails, with what it printed.  Engines go as soon as they
have been used.  What is done is remembered in the folder: the same command line goes on where the last one stopped.
On another machine, or with another PyTorch, the commands are walked again, with the same checkpoint.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from baichuan.cli.common import Parser, add_model_version, run_script
from baichuan.errors import ConfigError
from baichuan.parallel.comm import Communicator
from baichuan.util.affinity import cores
from benchmarks import measured_process
from benchmarks.random_checkpoint import model_of
from benchmarks.walk_stages import Command, Walk, checkpoint_command
from benchmarks.walk_tables import STATE, Line, read_lines, row, tables, write_lines

ROOT = Path(__file__).resolve().parent.parent
FAILED = 1  # exit code
TELLING = re.compile(
    r"written in [\d.]+ s|self-check against.*|ready in .*|prefill \d.*|.*tok/s.*|self-check skipped.*"
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.partition("\n")[0].rstrip(":"))
    add_model_version(parser, "version whose sizes the checkpoint has", default="v1_7b")
    parser.add_argument(
        "--folder", type=Path, default=Path("walk"), help="where everything goes: up to 50 GB for a 7B model"
    )
    parser.add_argument(
        "--calibrated_folder",
        type=Path,
        help="where calibrated folders go, up to 53 GB for a 13B model (default: beside the rest)",
    )
    parser.add_argument("--small", action="store_true", help="the demo's size, for machines without a GPU")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        help="walk these stages alone: float16, bfloat16, int8, int4, fp8, kv, sq, sq_auto, calibrated, awq, imported, "
        "replicas, tp2, tp4",
    )
    parser.add_argument("--tp", nargs="*", type=int, help="tensor-parallel sizes (default: 2; none with one GPU)")
    parser.add_argument("--limit_s", type=float, help="begin no command after so many seconds (default: no limit)")
    parser.add_argument("--timeout_s", type=float, default=900.0, help="seconds after which a command has failed")
    return run_script(parser, argv, walk)


def walk(args: argparse.Namespace, comm: Communicator) -> int:
    folder, start = args.folder.resolve() / args.model_version, time.monotonic()
    calibrated = (args.calibrated_folder or args.folder).resolve() / args.model_version
    ranks = tuple(default_ranks() if args.tp is None else args.tp)
    journey = Walk(args.model_version, folder, args.small, ranks, calibrated)
    stages = journey.stages()
    if unknown := [name for name in args.only or () if name not in stages]:
        raise ConfigError(f"--only {unknown[0]} is no stage of this walk; choose among {', '.join(stages)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.csv").write_text("5,17,300,42,9\n7,8,1000\n")
    chosen = [command for name in args.only or stages for command in stages[name]]
    where = machine(args.model_version, args.small)
    lines = walked_before(folder / STATE, where)
    done = {line.name for line in lines if line.machine == where} | {line.name for line in lines[:1]}
    commands = [checkpoint_command(journey), *chosen]
    todo = [command for command in commands if command.name not in done]
    print(where, flush=True)
    if before := len(commands) - len(todo):
        print(f"commands walked before: {before}; without {folder / STATE} they are walked again")
    for command in todo:
        if args.limit_s and time.monotonic() - start > args.limit_s:
            print(f"{args.limit_s:g} s are over; the same command line goes on with {command.name}")
            break
        print("$ " + shlex.join(shown(command.argv, folder)), flush=True)
        measured = measured_process.run(command.argv, ROOT, args.timeout_s)
        if measured.code != 0:
            print(measured.output[-20000:])
            why = f"exit code {measured.code}" if measured.code is not None else f"not done after {args.timeout_s:g} s"
            print(f"walk.py: {command.name} failed: {why}", file=sys.stderr)
            return FAILED
        lines.append(line_of(command, measured, folder, where))
        print(row(lines[-1]), flush=True)
        for left in command.leaves:
            shutil.rmtree(left)
        write_lines(folder / STATE, lines)
    print("\n" + tables(lines), flush=True)
    return 0


def walked_before(path: Path, where: str) -> list[Line]:
    """The lines of the walk that went before, the first of which is the checkpoint's.

    Raises ConfigError where that was of another size: its checkpoint is not the one to walk.
    """
    lines = read_lines(path) if path.exists() else []
    size = where.partition(";")[0]
    if lines and lines[0].machine.partition(";")[0] != size:
        other = lines[0].machine.partition(";")[0]
        raise ConfigError(f"{path.parent} holds a walk of {other}, and this one is of {size}; give another --folder")
    return lines


def default_ranks() -> list[int]:
    """Two ranks, or no tensor parallelism on a machine with a single GPU."""
    return [2] if torch.cuda.device_count() != 1 else []


def line_of(command: Command, done: measured_process.Measured, folder: Path, where: str) -> Line:
    size = sum(path.stat().st_size for path in command.engine.rglob("*") if path.is_file()) if command.engine else 0
    said = [found.group() for line in done.output.splitlines() if (found := TELLING.search(line))]
    words = shlex.join(shown(command.argv, folder))
    gigabytes = (done.host_bytes / 1e9, done.gpu_bytes / 1e9, size / 1e9)
    return Line(where, command.name, words, done.seconds, *gigabytes, "; ".join(said[-3:]))


def shown(argv: tuple[str, ...], folder: Path) -> list[str]:
    """The command as a user would type it."""
    replaced = ("python" if word == sys.executable else word for word in argv)
    return [word.replace(str(folder), ".").replace(f"{ROOT}/", "") for word in replaced]


def machine(version: str, small: bool) -> str:
    """The model and what it is walked on."""
    gpus = torch.cuda.device_count()
    name = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "no GPU"
    size = f"{version}, {model_of(version, small).num_layers} layers" + (" (small)" if small else "")
    return f"{size}; {name}; torch {torch.__version__}; {cores()} cores"


if __name__ == "__main__":
    sys.exit(main())
