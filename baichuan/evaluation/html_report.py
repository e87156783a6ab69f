"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from baichuan.evaluation.rouge import KINDS, LABELS, TOKENIZER
from baichuan.evaluation.svg_chart import Bar, bar_chart
from baichuan.evaluation.tasks import PROMPT_END
from baichuan.evaluation.wording import agreement_text, shown

MAX_ARTICLES = 200  # on the page; summaries.jsonl holds all of them
# Bytes that HTML has no character for; a model of noise can write them.
_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --ink: #1c2024; --quiet: #5b6470;
  --line: #d9dde3; --side0: #2563c9; --side1: #b4540a; --mark: #fde9c8; --warn: #8a1c1c }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --panel: #1e2327; --ink: #e6e9ec; --quiet: #9aa5b1;
  --line: #363d44; --side0: #3f7ad6; --side1: #bf6a26; --mark: #54411f; --warn: #ff9d9d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif }
h1 { font-size: 1.6rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
h3 { font-size: .95rem; margin: 0 0 .4rem }
p { margin: .4rem 0; max-width: 75ch }
.quiet { color: var(--quiet) }
.warn { color: var(--warn); font-weight: 600 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal }
thead th { color: var(--quiet); font-weight: 500; font-size: .85rem }
td small { display: block; color: var(--quiet) }
.name { display: inline-block; margin-right: 1em }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em }
.side0 { fill: var(--side0); background: var(--side0) } .side1 { fill: var(--side1); background: var(--side1) }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font-size: 13px; font-family: inherit }
svg .tick { fill: var(--quiet); font-size: 11px } svg .grid { stroke: var(--line) } svg .whisker { stroke: var(--ink) }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: .6rem 0 1rem }
.text { background: var(--panel); border-radius: 6px; padding: .8rem; max-height: 24rem; overflow: auto }
.text div { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem }
.text p { font-size: .8rem; margin: .6rem 0 0 }
mark { background: var(--mark); color: inherit }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere }
@media print { details:not([open]) > * { display: block } .text { max-height: none } }
"""


# What a side is, in the table of settings.
SIDE_FACTS = ("engine_dir", "model_dir", "device", "dtype", "model", "quant", "build")


@dataclass(frozen=True)
class _Side:
    key: str
    label: str
    css: str  # its colour: side0, side1


def page(values: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """The page.  values: report.results(); samples: report.sample_values() of each article."""
    sides = [_Side(side["key"], side["label"], f"side{index}") for index, side in enumerate(values["sides"])]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Summarisation report</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{STYLE}</style></head><body>",
        *_heading(values),
        *_figures(values["sides"], sides),
        *_charts(values["sides"], sides),
        *_agreement(values),
        *_articles(samples, sides),
        *_settings(values),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def text(value: Any) -> str:
    """`value` as HTML text, also within an attribute's quotes."""
    return escape(_NOT_HTML.sub("\ufffd", str(value)), quote=True)


def _heading(values: dict[str, Any]) -> list[str]:
    settings, articles = values["settings"], values["articles"]
    cut = f", {values['articles_cut']} of them cut to their end" if values["articles_cut"] else ""
    lines = [
        f"<header><h1>Summarisation report</h1><p>{articles} articles{cut}, from {text(settings['dataset'])}; "
        f"“{text(PROMPT_END.strip())}” appended, the last {text(settings['max_input_length'])} tokens kept, at most "
        f"{text(settings['output_len'])} new tokens, batches of {text(settings['batch_size'])}, "
        f"{text(settings['decoding'])} on every side.</p>"
    ]
    if not values["complete"]:
        lines.append('<p class="warn">The run is not complete: these are the batches it has finished.</p>')
    return [*lines, "</header>"]


def _figures(figures: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> list[str]:
    columns = [*LABELS.values(), "Perplexity", "Tokens/s", "Latency, s", "Weights, MB"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Side", *columns))
    lines = [f'<h2>Figures</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>']
    for side, figure in zip(sides, figures, strict=True):
        rouge = (figure["rouge"][kind] for kind in KINDS)
        cells = [f"{r['value']:.2f}<small>{r['low']:.1f} to {r['high']:.1f}</small>" for r in rouge]
        cells.append(shown(figure["perplexity"], ".4f"))
        cells += [f"{figure['tokens_per_s']:.1f}", f"{figure['latency_s']:.2f}", f"{figure['bytes'] / 1e6:.1f}"]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr><td><span class="key {side.css}"></span>{text(side.label)}</td>{row}</tr>')
    lines.append("</tbody></table></div>")
    lines.append(
        '<p class="quiet">ROUGE: mean F-measure in percent with its 95 % bootstrap interval, against the highlights. '
        f"Tokens of ROUGE: {text(TOKENIZER)}. Perplexity: of prompt and highlights together. Latency: generation "
        "alone, all batches.</p>"
    )
    return lines


def _charts(figures: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> list[str]:
    def bars(value, low=None, high=None):
        return [
            Bar(side.css, text(side.label), value(figure), low and low(figure), high and high(figure))
            for side, figure in zip(sides, figures, strict=True)
        ]

    rouge = {
        LABELS[kind]: bars(
            lambda figure, kind=kind: figure["rouge"][kind]["value"],
            lambda figure, kind=kind: figure["rouge"][kind]["low"],
            lambda figure, kind=kind: figure["rouge"][kind]["high"],
        )
        for kind in KINDS
    }
    legend = "".join(
        f'<span class="name"><span class="key {side.css}"></span>{text(side.label)}</span> ' for side in sides
    )
    speed = bar_chart("Tokens per second", {"Tokens/s": bars(lambda figure: figure["tokens_per_s"])})
    return [
        f'<h2>Scores</h2><p>{legend}</p><div class="charts">',
        f"<figure style='margin:0'>{bar_chart('ROUGE, percent', rouge)}</figure>",
        f"<figure style='margin:0'>{speed}</figure></div>",
    ]


def _agreement(values: dict[str, Any]) -> list[str]:
    sentence = agreement_text(values)
    return ["<h2>Agreement of the sides</h2>", f"<p>{text(sentence)}</p>"] if sentence else []


def _articles(samples: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> list[str]:
    lines = ["<h2>Articles</h2>"]
    if len(samples) > MAX_ARTICLES:
        lines.append(f'<p class="quiet">The first {MAX_ARTICLES} of {len(samples)}; summaries.jsonl holds all.</p>')
    for index, sample in enumerate(samples[:MAX_ARTICLES]):
        summaries = sample["summaries"]
        scores = ", ".join(f"{summaries[side.key]['rouge']['rouge1']:.1f}" for side in sides)
        note = ""
        if len(sides) == 2:
            same = summaries[sides[0].key]["ids"] == summaries[sides[1].key]["ids"]
            note = "; identical" if same else f"; they part after {sample['identical_prefix']} tokens"
        lines.append(f"<details{' open' if index < 3 else ''}><summary>{text(sample['id'])} ")
        lines.append(f'<span class="quiet">ROUGE-1 {scores}{note}</span></summary><div class="texts">')
        cut = f"{sample['prompt_tokens']} tokens of prompt"
        if sample["left_out_tokens"]:
            cut += f"; the first {sample['left_out_tokens']} tokens are over the limit and left out"
        lines.append(_text_box("Article", text(sample["article"]), cut))
        lines.append(_text_box("Highlights", text(sample["highlights"]), "written by a person"))
        common = os.path.commonprefix([summaries[side.key]["text"] for side in sides])
        for side in sides:
            summary = summaries[side.key]
            rest = summary["text"][len(common) :]
            body = text(common) + (f"<mark>{text(rest)}</mark>" if rest else "")
            body = body if len(sides) == 2 else text(summary["text"])
            end = {"stop": "ended by itself", "length": "stopped at the limit"}[summary["finish_reason"]]
            caption = f"{len(summary['ids'])} tokens, {end}"
            lines.append(_text_box(side.label, body, caption, side.css))
        lines.append("</div></details>")
    return lines


def _text_box(title: str, body: str, caption: str, css: str | None = None) -> str:
    """body: HTML; title and caption: text."""
    key = f'<span class="key {css}"></span>' if css else ""
    return (
        f'<section class="text" tabindex="0"><h3>{key}{text(title)}</h3><div dir="auto">{body}</div>'
        f'<p class="quiet">{text(caption)}</p></section>'
    )


def _settings(values: dict[str, Any]) -> list[str]:
    facts = {side["label"]: {name: side[name] for name in SIDE_FACTS if name in side} for side in values["sides"]}
    groups = {**values["settings"], **facts, **values["versions"]}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in groups.items()
    }
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in texts.items())
    return [f'<h2>Settings and versions</h2><div class="scroll"><table class="settings">{rows}</table></div>']
