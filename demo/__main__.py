"""The demo, `make demo`: a tiny Baichuan is trained, built in several precisions, asked and measured."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from unicodedata import east_asian_width

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.cli.common import Parser
from baichuan.config import VERSIONS
from demo import lessons, speed, train

WIDTH = 100  # columns of a command; the tables keep to them too
QUESTIONS = {"fp32": "世界上第二高的山峰是哪座？", "int4_weight_only": "How many legs does a spider have?"}  # by engine
PRECISIONS = {  # engine folder: further flags of build.py
    "fp32": ["--dtype", "float32"],
    "int8_weight_only": ["--use_weight_only"],
    "int4_weight_only": ["--use_weight_only", "--weight_only_precision", "int4"],
    "smooth_quant": ["--use_smooth_quant", "--per_token", "--per_channel"],
}
LARGER = ["--n_layer", "8", "--n_embd", "1024", "--n_head", "16", "--inter_size", "2752", "--vocab_size", "16000"]
SPEED_PRECISIONS = {
    "fp32": ["--dtype", "float32"],
    "fp16": ["--dtype", "float16"],
    **{name: PRECISIONS[name] for name in ("int8_weight_only", "int4_weight_only")},
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.prog = "python -m demo"
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="everything goes in here")
    parser.add_argument("--model_version", choices=tuple(VERSIONS), default="v1_13b", help="which Baichuan it is")
    args, start = parser.parse_args(argv), time.monotonic()
    out: Path = args.output_dir
    for step in (make_checkpoint, make_engines, ask, measure, measure_speed):
        step(args)
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    say(f"That took {minutes} min {seconds} s. Charts and texts: open {out / 'index.html'} in a browser")
    return 0


def make_checkpoint(args: argparse.Namespace) -> None:
    say("1. A tiny checkpoint in the hub's format, trained on the articles in demo/articles.jsonl")
    folder = args.output_dir / "checkpoint"
    if (folder / "config.json").exists():
        print(f"{folder} is there from an earlier run; remove it to train again", flush=True)
    else:
        flags = ["--model_version", args.model_version, "--output_dir", str(folder)]
        call(train.main, "demo/train.py", flags)


def make_engines(args: argparse.Namespace) -> None:
    say("2. Engines: float32, INT8 and INT4 weight-only, and SmoothQuant by way of a calibrated folder")
    checkpoint, binary = str(args.output_dir / "checkpoint"), str(args.output_dir / "smooth_quant_binary")
    data = ["--calib_dataset", str(relative(lessons.ARTICLES))]
    call(hf_baichuan_convert.main, "hf_baichuan_convert.py", ["-i", checkpoint, "-o", binary, "-sq", "0.5", *data])
    for name, precision in PRECISIONS.items():
        calibrated = name == "smooth_quant"
        source = ["--bin_model_dir", f"{binary}/1-gpu"] if calibrated else ["--model_dir", checkpoint]
        limits = ["--max_batch_size", "8", "--output_dir", str(args.output_dir / "engines" / name)]
        call(build.main, "build.py", [*source, *precision, *limits])


def ask(args: argparse.Namespace) -> None:
    say("3. Questions that it has learnt to answer")
    for name, question in QUESTIONS.items():
        engine = ["--engine_dir", str(args.output_dir / "engines" / name)]
        flags = ["--chat", "--input_text", question, "--max_output_len", "40", "--top_k", "1"]
        call(run.main, "run.py", [*engine, *flags])


def measure(args: argparse.Namespace) -> None:
    say("4. Summaries of articles that training never saw: the engines, and transformers on the checkpoint")
    engines = [str(args.output_dir / "engines" / name) for name in PRECISIONS]
    sides = ["--test_trt_llm", "--engine_dir", *engines, "--test_hf", "--data_type", "fp32"]
    data = ["--hf_model_dir", str(args.output_dir / "checkpoint"), "--dataset_path", str(relative(lessons.HELD_OUT))]
    shape = ["--batch_size", "8", "--output_len", "60", "--eval_ppl", "--output_dir", str(args.output_dir)]
    call(summarize.main, "summarize.py", [*sides, *data, *shape])


def measure_speed(args: argparse.Namespace) -> None:
    say("5. Speed where weights outgrow the cache: a larger model of random weights, which nobody has to train")
    folders = [str(args.output_dir / "speed" / name) for name in SPEED_PRECISIONS]
    for folder, precision in zip(folders, SPEED_PRECISIONS.values(), strict=True):
        sizes = ["--model_version", args.model_version, *LARGER]
        call(build.main, "build.py", [*sizes, *precision, "--no_self_check", "--output_dir", folder])
    call(speed.main, "demo/speed.py", ["--engine_dir", *folders])


def relative(path: Path) -> Path:
    """The path relative to the current folder, where it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def say(text: str) -> None:
    lines = textwrap.wrap(text, WIDTH, initial_indent="=== ", subsequent_indent="    ")
    print("", *lines, "", sep="\n", flush=True)


def call(script: Callable[[list[str]], int], name: str, argv: list[str]) -> None:
    """Run a script as its command line would, after showing it; the demo ends where a script fails."""
    print("\n".join(command_lines(["python", name, *argv])), flush=True)
    if status := script(argv):
        sys.exit(status)


def command_lines(words: list[str]) -> list[str]:
    """A command after a prompt, in lines that a shell reads as one; a flag and its first value stay together."""
    parts: list[str] = []
    for word in words:
        follows_flag = len(parts) > 1 and parts[-1].startswith("-") and " " not in parts[-1]
        value = not word.startswith("-") and (follows_flag or len(parts) == 1)
        parts += [f"{parts.pop()} {shlex.quote(word)}"] if value else [shlex.quote(word)]
    lines = ["$ " + parts[0]]
    for part in parts[1:]:
        if columns(lines[-1]) + columns(part) + 3 <= WIDTH:
            lines[-1] += " " + part
        else:
            lines[-1] += " \\"
            lines.append("      " + part)
    return lines


def columns(text: str) -> int:
    """The width of `text` on a terminal; Chinese characters take two columns."""
    return sum(2 if east_asian_width(each) in "WF" else 1 for each in text)


if __name__ == "__main__":
    sys.exit(main())
