"""Tokens per second of engines, one sequence at a time, and of a transformers model of their size, in one run:

python demo/speed.py --engine_dir FOLDER FOLDER ...
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.api.llm import LLM
from baichuan.cli.common import Parser, run_script
from baichuan.config import ModelConfig, SamplingConfig
from baichuan.evaluation.sides import EngineSide, HfSide, Side
from baichuan.evaluation.text_table import WIDTH, table
from baichuan.evaluation.wording import conditions_text, speed_text
from baichuan.hf_model.config import BaichuanConfig
from baichuan.hf_model.modeling import BaichuanForCausalLM
from baichuan.parallel.comm import Communicator

PROMPT = list(range(5, 13))
GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--engine_dir", nargs="+", required=True, help="folders that build.py wrote")
    parser.add_argument("--output_len", type=int, default=32, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in which the sides take turns; the best counts")
    return run_script(parser, argv, compare)


def compare(args: argparse.Namespace, comm: Communicator) -> int:
    llms = [LLM(folder) for folder in args.engine_dir]
    sides: list[Side] = [EngineSide(llm) for llm in llms]
    sides.append(HfSide(random_model(llms[0].engine.model), "random weights"))
    speeds = [0.0] * len(sides)
    for warm in (False, *[True] * args.rounds):
        for number, side in enumerate(sides):
            start = time.perf_counter()
            result = side.generate([PROMPT], GREEDY, args.output_len)[0]
            tokens = len(result.ids) + (result.finish_reason == "stop")
            if warm:
                speeds[number] = max(speeds[number], tokens / (time.perf_counter() - start))
    show(sides, speeds)
    return 0


def random_model(model: ModelConfig) -> BaichuanForCausalLM:
    """A float32 model of the engines' size; its speed does not depend on the weights' values."""
    return BaichuanForCausalLM(BaichuanConfig.of(replace(model, dtype="float32"))).float().eval()


def show(sides: list[Side], speeds: list[float]) -> None:
    """Print one line per side, with the weights read per second, and the sentences of the reports."""
    for side in sides:
        side.label = side.label.removesuffix(", dummy weights")
    rows = [
        [side.label, f"{size / 1e6:.1f}", f"{speed:.1f}", f"{size * speed / 1e9:.1f}", f"{speed / speeds[-1]:.2f}"]
        for side, speed in zip(sides, speeds, strict=True)
        for size in [side.facts["bytes"]]
    ]
    print(table(["", "weights, MB", "tokens/s", "weights read, GB/s", "over Hugging Face"], rows))
    values = {
        "sides": [
            {"label": side.label, **side.facts, "tokens_per_s": speed}
            for side, speed in zip(sides, speeds, strict=True)
        ],
        "settings": {"batch_size": 1},
    }
    for sentence in (conditions_text(values), speed_text(values)):
        if sentence:
            print(textwrap.fill(sentence, WIDTH))


if __name__ == "__main__":
    sys.exit(main())
