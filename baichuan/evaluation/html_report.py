"""One side of an evaluation as a page: its figures beside the reference's, where the two differ, every article."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baichuan.evaluation.html_page import document, figures_table, key, text
from baichuan.evaluation.rouge import KINDS, LABELS, TOKENIZER
from baichuan.evaluation.svg_chart import Bar, bar_chart
from baichuan.evaluation.tasks import PROMPT_END
from baichuan.evaluation.wording import agreement_text, conditions_text, report_title, shown

MAX_ARTICLES = 200  # on the page; summaries.jsonl holds all of them
OPEN_ARTICLES = 3
# The facts of a side that the table of settings shows.
SIDE_FACTS = ("engine_dir", "model_dir", "device", "threads", "dtype", "parameters", "model", "quant", "build")


@dataclass(frozen=True)
class _Side:
    key: str
    label: str
    css: str  # its colour: side0, side1


def page(values: dict[str, Any], samples: Sequence[dict[str, Any]], side: dict[str, Any]) -> str:
    """The page of `side` and, beside it, of the reference.

    values: report.results(), `side` one of its sides; samples: report.sample_values() of each article.
    """
    reference = [each for each in values["sides"] if each["key"] == values["reference"] != side["key"]]
    figures = [side, *reference]
    sides = [_Side(each["key"], each["label"], f"side{index}") for index, each in enumerate(figures)]
    title = report_title(side)
    parts = [
        f"<header><h1>{text(title)}</h1>",
        *heading(values),
        "</header>",
        *_figures(figures, sides),
        *_charts(figures, sides),
        *_agreement(values, side),
        *_articles(samples, sides),
        *_settings(values, figures),
    ]
    return document(title, parts)


def heading(values: dict[str, Any]) -> Iterator[str]:
    """The data set, the settings and the conditions of the run."""
    settings, articles = values["settings"], values["articles"]
    cut = f", {values['articles_cut']} of them cut to their end" if values["articles_cut"] else ""
    yield (
        f"<p>{articles} articles{cut}, from {text(settings['dataset'])}; "
        f"“{text(PROMPT_END.strip())}” appended, the last {text(settings['max_input_length'])} tokens kept, at most "
        f"{text(settings['output_len'])} new tokens, {text(settings['decoding'])} on every side.</p>"
    )
    yield f"<p>{text(conditions_text(values))}</p>"
    if not values["complete"]:
        yield '<p class="warn">The run is not complete: these are the batches it has finished.</p>'


def _figures(figures: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> Iterator[str]:
    rows = []
    for side, figure in zip(sides, figures, strict=True):
        rouge = (figure["rouge"][kind] for kind in KINDS)
        cells = [f"{r['value']:.2f}<small>{r['low']:.1f} to {r['high']:.1f}</small>" for r in rouge]
        cells.append(shown(figure["perplexity"], ".4f"))
        cells += [f"{figure['tokens_per_s']:.1f}", f"{figure['latency_s']:.2f}", f"{figure['bytes'] / 1e6:.1f}"]
        rows.append([key(side.css, side.label), *cells])
    yield "<h2>Figures</h2>"
    yield from figures_table(
        ["Side", *LABELS.values(), "Perplexity", "Tokens/s", "Latency, s", "Weights, MB"],
        rows,
    )
    yield (
        '<p class="quiet">ROUGE: mean F-measure in percent with its 95 % bootstrap interval, against the highlights. '
        f"Tokens of ROUGE: {text(TOKENIZER)}. Perplexity: of prompt and highlights together. Latency: generation "
        "alone, all batches.</p>"
    )


def _charts(figures: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> Iterator[str]:
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
    legend = "".join(f'<span class="name">{key(side.css, side.label)}</span> ' for side in sides)
    speed = bar_chart("Tokens per second", {"Tokens/s": bars(lambda figure: figure["tokens_per_s"])})
    yield f'<h2>Scores</h2><p>{legend}</p><div class="charts">'
    yield f"<figure>{bar_chart('ROUGE, percent', rouge)}</figure><figure>{speed}</figure></div>"


def _agreement(values: dict[str, Any], side: dict[str, Any]) -> Iterator[str]:
    if sentence := agreement_text(values, side):
        yield f"<h2>Agreement of the two</h2><p>{text(sentence)}</p>"


def _articles(samples: Sequence[dict[str, Any]], sides: Sequence[_Side]) -> Iterator[str]:
    """Articles on which the sides differ, fewest common first tokens first, then all others."""
    own, *reference = (side.key for side in sides)
    note = ""
    if reference:
        ordered = sorted(samples, key=lambda sample: (_same(sample, own, reference[0]), _prefix(sample, own)))
        parted = sum(not _same(sample, own, reference[0]) for sample in samples)
        note = f"On {parted} of {len(samples)} the two part; they come first, the soonest parted at the top. "
    else:
        ordered = list(samples)
    if len(samples) > MAX_ARTICLES:
        note += f"The first {MAX_ARTICLES} of {len(samples)}; summaries.jsonl holds all."
    yield "<h2>Articles</h2>" + (f'<p class="quiet">{note}</p>' if note else "")
    for index, sample in enumerate(ordered[:MAX_ARTICLES]):
        yield from _article(sample, sides, index < OPEN_ARTICLES)


def _same(sample: dict[str, Any], own: str, reference: str) -> bool:
    return sample["summaries"][own]["ids"] == sample["summaries"][reference]["ids"]


def _prefix(sample: dict[str, Any], own: str) -> int:
    return sample["summaries"][own]["identical_prefix"]


def _article(sample: dict[str, Any], sides: Sequence[_Side], opened: bool) -> Iterator[str]:
    summaries = sample["summaries"]
    scores = ", ".join(f"{summaries[side.key]['rouge']['rouge1']:.1f}" for side in sides)
    note = ""
    if len(sides) == 2:
        same = _same(sample, *(side.key for side in sides))
        note = "; identical" if same else f"; they part at token {_prefix(sample, sides[0].key) + 1}"
    yield f"<details{' open' if opened else ''}><summary>{text(sample['id'])} "
    yield f'<span class="quiet">ROUGE-1 {scores}{note}</span></summary><div class="texts">'
    cut = f"{sample['prompt_tokens']} tokens of prompt"
    if sample["left_out_tokens"]:
        cut += f"; the first {sample['left_out_tokens']} tokens are over the limit and left out"
    yield _text_box("Article", text(sample["article"]), cut)
    yield _text_box("Highlights", text(sample["highlights"]), "written by a person")
    common = os.path.commonprefix([summaries[side.key]["text"] for side in sides])
    for side in sides:
        summary = summaries[side.key]
        rest = summary["text"][len(common) :]
        body = text(common) + (f"<mark>{text(rest)}</mark>" if rest else "")
        body = body if len(sides) == 2 else text(summary["text"])
        end = {"stop": "ended by itself", "length": "stopped at the limit"}[summary["finish_reason"]]
        yield _text_box(side.label, body, f"{len(summary['ids'])} tokens, {end}", side.css)
    yield "</div></details>"


def _text_box(title: str, body: str, caption: str, css: str | None = None) -> str:
    """body: HTML; title and caption: text."""
    return (
        f'<section class="text" tabindex="0"><h3>{key(css, title) if css else text(title)}</h3>'
        f'<div dir="auto">{body}</div><p class="quiet">{text(caption)}</p></section>'
    )


def _settings(values: dict[str, Any], figures: Sequence[dict[str, Any]]) -> Iterator[str]:
    facts = {side["label"]: {name: side[name] for name in SIDE_FACTS if name in side} for side in figures}
    groups = {**values["settings"], **facts, **values["versions"]}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in groups.items()
    }
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in texts.items())
    yield f'<h2>Settings and versions</h2><table class="settings">{rows}</table>'
