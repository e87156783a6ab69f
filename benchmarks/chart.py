"""Draws bench_generate.py's results: python benchmarks/chart.py results.json ... --output docs/performance.svg

One bar for each model, precision and number of GPUs, in one panel for each batch size; beside it the time that reading
the step's bytes would take at the copy bandwidth of the same run, and what a peer takes for the same on the same kind
of GPU.  Of two results for the same bar the later one is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baichuan.cli.common import Parser, run_script
from baichuan.errors import ConfigError
from baichuan.evaluation.svg_chart import LETTER, Axis
from baichuan.parallel.comm import Communicator

PRECISIONS = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "INT8 weights",
    "int4": "INT4 weights, groups of 32",
    "int4_zeros": "INT4 weights and zeros, groups of 32",
    "int4_per_channel": "INT4 weights, per channel",
    "int4_g64": "INT4 weights, groups of 64",
    "int4_g64_zeros": "INT4 weights and zeros, groups of 64",
    "int4_g128": "INT4 weights, groups of 128",
    "int4_g128_zeros": "INT4 weights and zeros, groups of 128",
    "smooth_quant": "SmoothQuant",
    "smooth_quant_per_token": "SmoothQuant, per token",
    "fp8": "FP8",
    "fp8_per_token": "FP8, per token and per channel",
}
PEER = "vLLM 0.24, the same model; for 8-bit products its FP8 Llama-13B"
PEER_FP8 = {1: 5.31, 64: 9.5, 256: 24.2, 1024: 84.5}
PEER_MS = {  # ms per step by batch size, on one H200, 128 tokens in
    ("v1_7b", "float16"): {1: 4.75, 8: 5.07, 64: 7.31, 256: 17.1, 1024: 67.4},
    ("v2_13b", "float16"): {1: 7.98, 8: 8.43, 64: 11.5, 256: 26.1, 1024: 123.0},
    ("v2_13b", "fp8"): PEER_FP8,
    ("v2_13b", "smooth_quant"): PEER_FP8,
    ("v2_13b", "smooth_quant_per_token"): PEER_FP8,
}
PLOT, VALUES, TOP = 430, 84, 96  # pixels
ROW, BAR, HEADING, AXIS = 26, 18, 26, 38
VALUE_WIDTH = 76  # pixels for a value inside its bar
STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 }
.batch { font-weight: 600 }
.tick { font-size: 11px; fill: #57606a }
.grid { stroke: #d8dee4 }
.bar { fill: #2f6fbb }
.limit { stroke: #f0a30a; stroke-width: 4 }
.peer { fill: #ffffff; stroke: #24292f; stroke-width: 2.5 }
.inside { fill: #ffffff; font-weight: 600 }
"""


@dataclass(frozen=True)
class Bar:
    label: str
    step_ms: float
    limit_ms: float
    peer_ms: float | None

    @property
    def end_ms(self) -> float:
        return max(self.step_ms, self.limit_ms, self.peer_ms or 0)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files that bench_generate.py --json wrote")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.svg"), help="the drawing")
    return run_script(parser, argv, draw)


def draw(args: argparse.Namespace, comm: Communicator) -> int:
    files = [_read(path) for path in args.results]
    panels: dict[int, dict[str, Bar]] = {}
    for result in (result for file in files for result in file["results"]):
        bar = _bar(result)
        panels.setdefault(result["batch_size"], {})[bar.label] = bar
    if not panels:
        raise ConfigError(f"{args.results[0]} holds no results; run bench_generate.py --json with that file again")
    gpus = sorted({file["gpu"] for file in files})
    title = f"Milliseconds a decode step, {' and '.join(gpus)}, dummy weights"
    args.output.write_text(chart(title, {batch: list(panels[batch].values()) for batch in sorted(panels)}))
    return 0


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no file of bench_generate.py --json ({error}); run that first") from None


def _bar(result: dict) -> Bar:
    version, precision, tp_size = result["model_version"], result["precision"], result["tp_size"]
    cache = "" if result["kv_cache"] == "none" else f", {result['kv_cache']} cache"
    gpus = "" if tp_size == 1 else f", {tp_size} GPUs"
    peer = PEER_MS.get((version, precision), {}).get(result["batch_size"]) if tp_size == 1 else None
    return Bar(f"{version} {PRECISIONS[precision]}{cache}{gpus}", result["step_ms"], result["limit_ms"], peer)


def chart(title: str, panels: dict[int, Sequence[Bar]]) -> str:
    """An SVG file: a title, a legend, and for each batch size its bars from 0 over an axis of their own."""
    y = TOP
    parts: list[str] = []
    left = math.ceil(28 + LETTER * max(len(bar.label) for bars in panels.values() for bar in bars))
    for batch, bars in panels.items():
        parts += _panel(f"Batch {batch}", bars, left, y)
        y += HEADING + ROW * len(bars) + AXIS
    width = left + PLOT + VALUES
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{width}" height="{y}" fill="#ffffff"/>\n'
        f'<text class="title" x="16" y="28">{escape(title)}</text>\n'
        '<rect class="bar" x="16" y="44" width="20" height="12"/><text x="44" y="54">this engine</text>\n'
        '<path class="limit" d="M150 41v18"/>'
        '<text x="162" y="54">the step&#8217;s bytes at the copy bandwidth of the same run</text>\n'
        f'<circle class="peer" cx="26" cy="74" r="5"/><text x="44" y="78">{escape(PEER)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(heading: str, bars: Sequence[Bar], left: float, top: float) -> Iterator[str]:
    axis, first = Axis(max(bar.end_ms for bar in bars), left, PLOT), top + HEADING
    scale = axis.scale
    yield f'<text class="batch" x="16" y="{top + 17}">{heading}</text>'
    yield from axis.grid(first, first + ROW * len(bars))
    for number, bar in enumerate(bars):
        middle = first + ROW * number + ROW / 2
        yield f'<text x="{left - 10}" y="{middle + 4.5}" text-anchor="end">{escape(bar.label)}</text>'
        size = f'width="{bar.step_ms * scale:.1f}" height="{BAR}"'
        yield f'<rect class="bar" x="{left}" y="{middle - BAR / 2}" {size}/>'
        yield f'<path class="limit" d="M{left + bar.limit_ms * scale:.1f} {middle - BAR / 2 - 2}v{BAR + 4}"/>'
        fits = min(bar.step_ms, bar.limit_ms) * scale > VALUE_WIDTH
        beside = bar.end_ms * scale + (48 if bar.peer_ms else 12)
        style, x = ("inside", 8) if fits else ("beside", beside)
        yield f'<text class="{style}" x="{left + x:.1f}" y="{middle + 4.5}">{_digits(bar.step_ms)} ms</text>'
        if bar.peer_ms:
            x = left + bar.peer_ms * scale
            yield f'<circle class="peer" cx="{x:.1f}" cy="{middle}" r="5"/>'
            x = left + max(bar.peer_ms, bar.step_ms) * scale + 11
            yield f'<text class="tick" x="{x:.1f}" y="{middle + 4}">{_digits(bar.peer_ms)}</text>'


def _digits(value: float) -> str:
    """The value with three significant digits."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
