"""The README's workflow from a checkpoint to a summary, every kind of command in order, each as a process:

python benchmarks/walk.py --model_version v1_7b

Makes a random checkpoint of the version at full size (--small: of the demo's size), then builds, converts, runs and
summarises in every precision.  Prints each command with its time, the most host and GPU memory that it held and the
bytes of its engine; ends non-zero at the first command that fails, with what it printed.  Engines go as soon as they
have been used.  What is done is remembered in the folder: the same command line goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from baichuan.cli.common import Parser, add_model_version, run_script
from baichuan.errors import ConfigError
from baichuan.parallel.comm import Communicator
from baichuan.util.affinity import cores
from benchmarks import measured_process
from benchmarks.random_checkpoint import model_of
from benchmarks.walk_tables import STATE, Line, read_lines, row, tables, write_lines

ROOT = Path(__file__).resolve().parent.parent
ARTICLES = ROOT / "demo" / "articles.jsonl"
QUESTION = "世界上第二高的山峰是哪座？"
FAILED = 1  # exit code
TELLING = re.compile(
    r"written in [\d.]+ s|self-check against.*|ready in .*|prefill \d.*|.*tok/s.*|self-check skipped.*"
)


@dataclass(frozen=True)
class Command:
    """One line of the walk."""

    name: str
    argv: tuple[str, ...]
    engine: Path | None = None  # the folder that it writes, whose size is reported
    leaves: tuple[Path, ...] = ()  # paths that no later command needs


@dataclass(frozen=True)
class Walk:
    """The commands over one checkpoint."""

    version: str
    folder: Path
    small: bool
    ranks: tuple[int, ...]  # tp_size of each tensor-parallel stage
    calibrated: Path  # where calibrated folders are written

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def stages(self) -> dict[str, list[Command]]:
        """The commands by stage; a stage needs only the checkpoint."""
        weight_only = ("--use_weight_only",)
        stages = {
            "float16": self._use("float16", ("--dtype", "float16"), everything=True),
            "bfloat16": self._use("bfloat16", ("--dtype", "bfloat16")),
            "int8": self._use("int8", weight_only),
            "int4": self._use("int4", (*weight_only, "--weight_only_precision", "int4")),
            "kv": list(self._kv()),
            "sq": list(self._smooth_quant()),
        }
        stages |= {f"tp{ranks}": list(self._ranks(ranks)) for ranks in self.ranks}
        return stages

    def _kv(self) -> Iterator[Command]:
        binary = self.calibrated / "kv"
        gpu = binary / "1-gpu"
        yield self._convert("convert -kv", binary, "--calibrate-kv-cache")
        yield from self._use("int8, INT8 KV", ("--int8_kv_cache", "--use_weight_only"), gpu)
        yield from self._use("fp8, FP8 KV", ("--enable_fp8", "--fp8_kv_cache"), gpu)
        scales = ("--enable_fp8", "--quantized_fp8_model_path", str(gpu / "fp8_scales.npz"))
        yield from self._use("fp8 from the checkpoint", scales, leaves=(binary,))

    def _smooth_quant(self) -> Iterator[Command]:
        binary = self.calibrated / "sq"
        gpu = binary / "1-gpu"
        yield self._convert("convert -sq 0.8", binary, "-sq", "0.8")
        modes = {
            "sq per tensor": (),
            "sq per token": ("--per_token",),
            "sq per channel": ("--per_channel",),
            "sq, INT8 KV": ("--per_token", "--per_channel", "--int8_kv_cache"),
        }
        for name, flags in modes.items():
            last = name == list(modes)[-1]
            yield from self._use(name, ("--use_smooth_quant", *flags), gpu, leaves=(binary,) if last else ())

    def _ranks(self, ranks: int) -> Iterator[Command]:
        name, engine = f"tp {ranks}", self.folder / f"engine-tp{ranks}"
        launcher = ("mpirun", "-n", str(ranks), "--allow-run-as-root", "--oversubscribe")
        yield self._build(name, engine, ("--dtype", "float16", "--world_size", str(ranks), "--parallel_build"))
        for turn in ("first", "second"):
            yield Command(f"run {name}, {turn} time", (*launcher, *self._run(engine)))
        yield Command(f"summarize {name}", (*launcher, *self._summarize(engine)), leaves=(engine,))

    def _use(self, name, flags, binary: Path | None = None, everything=False, leaves=()) -> list[Command]:
        """Build an engine and run it."""
        engine = self.folder / ("engine-" + re.sub(r"\W+", "-", name))
        commands = [self._build(name, engine, flags, binary)]
        if not everything:
            return [*commands, Command(f"run {name}", self._run(engine), leaves=(engine, *leaves))]
        prompts, ids = self.folder / "prompts.csv", self.folder / "ids.csv"
        arrays = ("--output_npy", ids.with_suffix(".npy"), "--output_logits_npy", self.folder / "logits.npy")
        files = ("--input_tokens", prompts, "--output_csv", ids, *arrays)
        ways = {
            "run, first time": self._run(engine),
            "run, second time": self._run(engine),
            "run --chat --streaming": self._run(engine, "--chat", "--streaming", "--input_text", QUESTION),
            "run with files": self._script("run.py", "--max_output_len", "20", "--engine_dir", engine, *files),
            "run with beams": self._run(engine, "--num_beams", "2"),
            "summarize, both sides": self._summarize(engine, "--test_hf", "--eval_ppl"),
        }
        commands += [Command(way, argv) for way, argv in ways.items()]
        return [*commands[:-1], Command(commands[-1].name, commands[-1].argv, leaves=(engine, *leaves))]

    def _script(self, script: str, *flags) -> tuple[str, ...]:
        return (sys.executable, str(ROOT / script), *map(str, flags))

    def _convert(self, name: str, output: Path, *flags) -> Command:
        common = ("--model_version", self.version, "-i", self.checkpoint, "-o", output, "-t", "fp16")
        argv = self._script("hf_baichuan_convert.py", *common, *flags, "--calib_dataset", ARTICLES)
        return Command(name, argv, output)

    def _build(self, name: str, engine: Path, flags, binary: Path | None = None) -> Command:
        source = ("--bin_model_dir", binary) if binary else ("--model_dir", self.checkpoint)
        limits = ("--max_batch_size", "4", "--max_beam_width", "2", "--output_dir", engine)
        argv = self._script("build.py", "--model_version", self.version, *source, *flags, *limits)
        return Command(f"build {name}", argv, engine)

    def _run(self, engine: Path, *flags) -> tuple[str, ...]:
        length = (
            ("--max_output_len", "100", "--top_k", "1") if "--num_beams" not in flags else ("--max_output_len", "50")
        )
        return self._script("run.py", *length, "--tokenizer_dir", self.checkpoint, "--engine_dir", engine, *flags)

    def _summarize(self, engine: Path, *flags) -> tuple[str, ...]:
        common = ("--test_trt_llm", "--hf_model_dir", self.checkpoint, "--data_type", "fp16", "--engine_dir", engine)
        shape = ("--batch_size", "4", "--max_ite", "4", "--output_len", "50", "--dataset_path", ARTICLES)
        return self._script("summarize.py", *common, *shape, *flags)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.partition("\n")[0].rstrip(":"))
    add_model_version(parser, "whose sizes", default="v1_7b")
    parser.add_argument(
        "--folder", type=Path, default=Path("walk"), help="where everything goes: up to 50 GB for a 7B model"
    )
    parser.add_argument(
        "--calibrated_folder",
        type=Path,
        help="where calibrated folders go, of a 13B model 54 GB (default: beside the rest)",
    )
    parser.add_argument("--small", action="store_true", help="the demo's size, for machines without a GPU")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="float16, bfloat16, int8, int4, kv, sq, tp2, tp4")
    parser.add_argument("--tp", nargs="*", type=int, help="tensor-parallel sizes; default: 2 where there are two GPUs")
    parser.add_argument("--limit_s", type=float, help="begin no command after so many seconds")
    parser.add_argument("--timeout_s", type=float, default=900.0, help="of one command")
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
    lines = read_lines(folder / STATE) if (folder / STATE).exists() else []
    where = machine(args.model_version, args.small)
    print(where, flush=True)
    for command in [checkpoint_command(journey), *chosen]:
        if command.name in {line.name for line in lines}:
            continue
        if args.limit_s and time.monotonic() - start > args.limit_s:
            print(f"{args.limit_s:g} s are over; the same command line goes on with {command.name}")
            break
        print("$ " + shlex.join(shown(command.argv, folder)), flush=True)
        done = measured_process.run(command.argv, ROOT, args.timeout_s)
        if done.code != 0:
            print(done.output[-20000:])
            why = f"exit code {done.code}" if done.code is not None else f"not done after {args.timeout_s:g} s"
            print(f"walk.py: {command.name} failed: {why}", file=sys.stderr)
            return FAILED
        lines.append(line_of(command, done, folder, where))
        print(row(lines[-1]), flush=True)
        for left in command.leaves:
            shutil.rmtree(left)
        write_lines(folder / STATE, lines)
    print("\n" + tables(lines), flush=True)
    return 0


def checkpoint_command(journey: Walk) -> Command:
    flags = ["--model_version", journey.version, "--output_dir", str(journey.checkpoint)]
    argv = (sys.executable, str(ROOT / "benchmarks" / "random_checkpoint.py"), *flags)
    return Command("checkpoint", (*argv, *(("--small",) if journey.small else ())), journey.checkpoint)


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
