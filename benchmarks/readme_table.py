"""The README's tables of versions and of precisions, and docs/performance.md's of GPUs:
python benchmarks/readme_table.py --write

Bytes are computed from the models' shapes; speeds are docs/performance.json's, GPU memory and build times are
docs/walk.md's, the real model's quality is docs/accuracy.md's.  A cell without a measurement holds a dash.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import weight
from baichuan.cli.common import Parser, run_script
from baichuan.config import PRESETS, ModelConfig, QuantConfig
from baichuan.executors.memory import kv_cache_bytes
from baichuan.parallel.comm import Communicator
from baichuan.util.files import atomic_path
from baichuan.weights.rank_tensors import total_bytes
from baichuan.weights.shard import LINEARS

ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "README.md": "version | precision | engine, GB | KV cache, GB | GPU, GB | build, s | tok/s, batch 1 | batch 64",
    "README.zh.md": "版本 | 精度 | 引擎，GB | KV cache，GB | 显存，GB | 构建，秒 | token/s，batch 1 | batch 64",
}
QUALITY_HEADS = {
    "README.md": "precision | bits per weight | v2_13b, GB | tok/s, batch 1 | batch 64 | mean KL | perplexity",
    "README.zh.md": "精度 | 每权重位数 | v2_13b，GB | token/s，batch 1 | batch 64 | 平均 KL | 困惑度",
}
GPU_HEAD = "v2_13b | 1 user: 1 GPU | 2 GPUs | 4 GPUs | 64 users: 1 GPU | 2 GPUs | 4 GPUs"
PERFORMANCE = "docs/performance.md"
BEGIN = "<!-- made by benchmarks/readme_table.py -->\n"
QUALITY_BEGIN = "<!-- precisions made by benchmarks/readme_table.py -->\n"
END = "<!-- end of the table -->\n"
BATCHES = (1, 64)  # batch sizes of the columns with speeds
KV_TOKENS = 1000
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Precision:
    """A precision, which is one row per version."""

    title: str
    quant: QuantConfig
    measured: str  # its name in docs/performance.json
    walked: str  # its name in docs/walk.md


PRECISIONS = (
    Precision("float16", QuantConfig(), "float16", "float16"),
    Precision("INT8", QuantConfig("int8"), "int8", "int8"),
    Precision("INT4", QuantConfig("int4", group_size=32), "int4", "int4"),
    Precision("SmoothQuant", QuantConfig("smooth_quant", per_token=True), "smooth_quant_per_token", "sq per token"),
    Precision("FP8", QuantConfig("fp8"), "fp8", "fp8 from the checkpoint"),
)


@dataclass(frozen=True)
class Quality:
    """A precision, which is one row of the real model's table."""

    title: str
    quant: QuantConfig
    row: str  # its name in docs/accuracy.md
    measured: str = ""  # its name in docs/performance.json, if it has been


INT4 = {name: QuantConfig("int4", group_size=size) for name, size in (("int4", 32), ("int4_g64", 64))}
SMOOTH = QuantConfig("smooth_quant", per_token=True, per_channel=True)
QUALITIES = (
    Quality("float16", QuantConfig(), "float16", "float16"),
    Quality("INT8", QuantConfig("int8"), "INT8 weight-only", "int8"),
    Quality("INT8, GPTQ", QuantConfig("int8"), "INT8 by GPTQ", "int8"),
    *(
        Quality(
            f"INT4 g{quant.group_size}, {method}",
            replace(quant, zero_points=True),
            f"INT4 by {method}, groups of {quant.group_size}",
            f"{measured}_zeros",
        )
        for method in ("GPTQ", "AWQ")
        for measured, quant in INT4.items()
    ),
    *(
        Quality(f"INT4 g{quant.group_size}", quant, f"INT4 weight-only, groups of {quant.group_size}", measured)
        for measured, quant in INT4.items()
    ),
    Quality("SmoothQuant", SMOOTH, "SmoothQuant auto, pt + pc", "smooth_quant_per_token"),
    Quality("FP8", replace(SMOOTH, weights="fp8"), "FP8, pt + pc", "fp8_per_token"),
)


@cache
def engine_bytes(model: ModelConfig, quant: QuantConfig) -> int:
    """Bytes of the tensors of a one-rank engine; the file's header and the tokenizer add about 2 MB."""
    if quant.weights not in ("smooth_quant", "fp8"):
        tensors = weight.rank_tensors(weight.WeightSource(), model, quant, 0, 1)
        shapes = {name: shape for each in tensors for name, (_, shape) in each.specs.items()}
        zeros = sum(prod(shape) for name, shape in shapes.items() if name.endswith(".scale"))  # one byte each
        return total_bytes(tensors) + (zeros if quant.zero_points else 0)
    float32s = 0 if quant.per_token else len(LINEARS)  # activation scales per layer
    if quant.weights == "smooth_quant":
        float32s += model.hidden_size + model.intermediate_size  # smoothers per layer
    return engine_bytes(model, QuantConfig("int8")) + FLOAT32_BYTES * float32s * model.num_layers


def read_speeds(path: Path, tp_size: int = 1) -> dict[tuple[str, str, int], float]:
    """Tokens per second of decoding by version, precision and batch size, on tp_size GPUs."""
    results = json.loads(path.read_text("utf-8"))["results"]
    chosen = [each for each in results if each["tp_size"] == tp_size and each["kv_cache"] == "none"]
    return {
        (each["model_version"], each["precision"], each["batch_size"]): 1e3 * each["batch_size"] / each["step_ms"]
        for each in chosen
    }


def read_walk(path: Path) -> dict[tuple[str, str], list[str]]:
    """The cells of benchmarks/walk.py's tables by version and command; none without the file."""
    cells, version = {}, None
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        if found := re.match(r"(v\d_\d+b), \d+ layers(.*?); (.*?);", line.lstrip("# *")):
            version = None if found[2] or found[3] == "no GPU" else found[1]  # at full size, on a GPU
        elif line.startswith("| ") and version:
            name, *rest = (cell.strip() for cell in line.strip("| \n").split(" | "))
            cells[version, name] = rest
    return cells


def rounded(rate: float | None) -> str:
    """A cell: tokens per second, or a dash where none were measured."""
    return f"{rate:,.0f}" if rate else "–"


def table(head: str) -> str:
    """Markdown, a row for each version and precision."""
    speeds, walk = read_speeds(ROOT / "docs" / "performance.json"), read_walk(ROOT / "docs" / "walk.md")
    lines = [f"| {head} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for version, model in PRESETS.items():
        for precision in PRECISIONS:
            quant = precision.quant
            cache = kv_cache_bytes(model, replace(quant, kv_cache="none"), 1, 1, KV_TOKENS)
            build = walk.get((version, f"build {precision.walked}"), ["–"])[0]
            ran = "run, second time" if precision.title == "float16" else f"run {precision.walked}"
            gpu = walk.get((version, ran), ["–"] * 3)[2] or "–"
            rates = (speeds.get((version, precision.measured, batch)) for batch in BATCHES)
            cells = (
                version,
                precision.title,
                f"{engine_bytes(model, quant) / 1e9:.2f}",
                f"{cache / 1e9:.2f}",
                gpu,
                build,
                *map(rounded, rates),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def quality_table(head: str) -> str:
    """Markdown, a row for each precision."""
    speeds = read_speeds(ROOT / "docs" / "performance.json")
    accuracy, model = (ROOT / "docs" / "accuracy.md").read_text("utf-8"), PRESETS["v2_13b"]
    lines = [f"| {head} |", "|---|---:|---:|---:|---:|---:|---:|"]
    float16 = engine_bytes(model, QuantConfig())
    weights = model.num_layers * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)
    for each in QUALITIES:
        size = engine_bytes(model, each.quant)
        rates = (speeds.get(("v2_13b", each.measured, batch)) for batch in BATCHES)
        found = re.search(rf"^\| {re.escape(each.row)} \| ([\d.]+) \| [^|]+ \| ([\d.]+) \|", accuracy, re.MULTILINE)
        cells = (
            each.title,
            f"{16 - 8 * (float16 - size) / weights:.3g}",
            f"{size / 1e9:.2f}",
            *map(rounded, rates),
            *(found.groups() if found else "––"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gpu_table() -> str:
    """Markdown, a row for each precision, with tokens per second on 1, 2 and 4 GPUs."""
    speeds = {tp_size: read_speeds(ROOT / "docs" / "performance.json", tp_size) for tp_size in (1, 2, 4)}
    lines = [f"| {GPU_HEAD} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for precision in PRECISIONS:
        rates = (each.get(("v2_13b", precision.measured, batch)) for batch in BATCHES for each in speeds.values())
        lines.append("| " + " | ".join((precision.title, *map(rounded, rates))) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str, new: str, begin: str = BEGIN) -> str:
    """`text` with the table between its marks replaced."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return before + begin + new + END + after


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.partition(":")[0])
    parser.add_argument("--write", action="store_true", help="put them into their files; else they are printed")
    return run_script(parser, argv, run)


def run(args: argparse.Namespace, comm: Communicator) -> int:
    tables = {
        name: {BEGIN: table(head), QUALITY_BEGIN: quality_table(QUALITY_HEADS[name])} for name, head in HEADS.items()
    }
    for name, of_file in (tables | {PERFORMANCE: {BEGIN: gpu_table()}}).items():
        text = (ROOT / name).read_text("utf-8")
        for begin, made in of_file.items():
            text = with_table(text, made, begin)
            if not args.write:
                print(made)
        if args.write:
            with atomic_path(ROOT / name) as path:
                path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
