"""The demo, `make demo`: train a tiny Baichuan, build it in every precision, let it answer, measure what each costs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.config import VERSIONS
from baichuan.evaluation import report
from demo import train

ARTICLES = Path(__file__).parent / "articles.jsonl"
QUESTION = "世界上第二高的山峰是哪座？"
PRECISIONS = {  # engine folder: what build.py is told besides
    "fp32": ["--dtype", "float32"],
    "int8_weight_only": ["--use_weight_only"],
    "int4_weight_only": ["--use_weight_only", "--weight_only_precision", "int4"],
    "smooth_quant": ["--use_smooth_quant", "--per_token", "--per_channel"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="everything goes in here")
    parser.add_argument("--model_version", choices=tuple(VERSIONS), default="v1_13b")
    args = parser.parse_args(argv)
    out, version = args.output_dir, ["--model_version", args.model_version]
    checkpoint, binary = str(out / "checkpoint"), str(out / "smooth_quant_binary")

    say("1. A tiny checkpoint in the hub's format, trained on the articles in demo/articles.jsonl")
    if not (out / "checkpoint" / "config.json").exists():
        call(train.main, "demo/train.py", [*version, "--output_dir", checkpoint])

    say("2. Engines: float32, INT8 and INT4 weight-only, and SmoothQuant by way of a calibrated binary folder")
    data = ["--calib_dataset", str(ARTICLES), "--calib_size", "16"]
    flags = ["-i", checkpoint, "-o", binary, "-sq", "0.5", "-t", "fp16", "-p", "1"]
    call(hf_baichuan_convert.main, "hf_baichuan_convert.py", [*flags, *version, *data])
    for name, precision in PRECISIONS.items():
        calibrated = name == "smooth_quant"
        source = ["--bin_model_dir", f"{binary}/1-gpu"] if calibrated else ["--model_dir", checkpoint]
        limits = ["--max_batch_size", "8", "--output_dir", str(out / "engines" / name)]
        call(build.main, "build.py", [*version, *source, *precision, *limits])

    say("3. A question")
    for name in ("fp32", "int4_weight_only"):
        engine = ["--engine_dir", str(out / "engines" / name), "--tokenizer_dir", checkpoint]
        call(run.main, "run.py", ["--max_output_len", "40", "--top_k", "1", "--input_text", QUESTION, *engine])

    say("4. Summaries of the articles: each engine, and transformers on the same checkpoint")
    results = []
    for name in PRECISIONS:
        sides = ["--test_trt_llm", "--engine_dir", str(out / "engines" / name), "--test_hf", "--data_type", "fp32"]
        folder = out / "summaries" / name
        data = ["--hf_model_dir", checkpoint, "--dataset_path", str(ARTICLES), "--eval_ppl"]
        shape = ["--batch_size", "8", "--max_ite", "3", "--output_len", "60", "--output_dir", str(folder)]
        call(summarize.main, "summarize.py", [*sides, *data, *shape])
        results.append(str(folder / report.RESULTS_NAME))

    say("5. What each precision costs")
    status = report.main(results)
    say(f"The reports, charts and texts side by side, are {out}/summaries/*/report.html")
    return status


def say(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def call(script: Callable[[list[str]], int], name: str, argv: list[str]) -> None:
    """Run a script as its command line would, after showing it; the demo ends where a script fails."""
    print(f"$ python {name} {shlex.join(argv)}", flush=True)
    if status := script(argv):
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
