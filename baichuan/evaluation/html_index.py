"""Several sides of one evaluation on one page: what each precision costs, with links to their reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baichuan.evaluation.html_page import document, figures_table, key, text
from baichuan.evaluation.html_report import heading
from baichuan.evaluation.svg_chart import Bar, bar_chart
from baichuan.evaluation.wording import shown, speed_text

TITLE = "What each precision costs"


def page(values: dict[str, Any], links: Mapping[str, str]) -> str:
    """values: report.results(); links: the file name of each side's own page, by the side's key."""
    sides, reference = values["sides"], values["reference"]
    css = {side["key"]: "side1" if side["key"] == reference else "side0" for side in sides}
    parts = [f"<header><h1>{TITLE}</h1>", *heading(values), "</header>", *_charts(sides, css)]
    if sentence := speed_text(values):
        parts.append(f"<p>{text(sentence)}</p>")
    parts += ["<h2>Figures</h2>", *_figures(sides, css, links)]
    return document(TITLE, parts)


def _charts(sides: Sequence[dict[str, Any]], css: Mapping[str, str]) -> Iterator[str]:
    """Charts for bytes, speed and quality; a figure that is missing or not finite has no bar."""

    def groups(name):
        return {text(_short(side)): [Bar(css[side["key"]], text(side["label"]), side[name])] for side in sides}

    def rouge(side):
        score = side["rouge"]["rouge1"]
        return [Bar(css[side["key"]], text(side["label"]), score["value"], score["low"], score["high"])]

    megabytes = {
        text(_short(side)): [Bar(css[side["key"]], text(side["label"]), side["bytes"] / 1e6)] for side in sides
    }
    divergences = {
        text(_short(side)): [Bar(css[side["key"]], text(side["label"]), side["agreement"]["mean_kl"])]
        for side in sides
        if side["agreement"] and isinstance(side["agreement"]["mean_kl"], float)
    }
    charts = [
        bar_chart("Weights, MB", megabytes),
        bar_chart("Tokens per second", groups("tokens_per_s")),
        bar_chart("ROUGE-1, percent, 95 % interval", {text(_short(side)): rouge(side) for side in sides}),
        bar_chart("KL to the reference, nats", divergences, ".2g") if divergences else "",
    ]
    yield f'<div class="charts">{"".join(f"<figure>{chart}</figure>" for chart in charts if chart)}</div>'


def _figures(sides: Sequence[dict[str, Any]], css: Mapping[str, str], links: Mapping[str, str]) -> Iterator[str]:
    columns = ["Side", "Weights, MB", "Tokens/s", "ROUGE-1", "ROUGE-L", "Perplexity", "KL, nats", "Identical summaries"]
    rows = []
    for side in sides:
        name, agreement = key(css[side["key"]], side["label"]), side["agreement"]
        if link := links.get(side["key"]):
            name = f'<a href="{text(link)}">{name}</a>'
        one, long = side["rouge"]["rouge1"], side["rouge"]["rougeL"]
        rows.append(
            [
                name,
                f"{side['bytes'] / 1e6:.1f}",
                f"{side['tokens_per_s']:.1f}",
                f"{one['value']:.2f}<small>{one['low']:.1f} to {one['high']:.1f}</small>",
                f"{long['value']:.2f}<small>{long['low']:.1f} to {long['high']:.1f}</small>",
                shown(side["perplexity"], ".4f"),
                shown(agreement and agreement["mean_kl"], ".2e"),
                shown(agreement and agreement["identical_summaries"], "d"),
            ]
        )
    yield from figures_table(columns, rows)
    yield '<p class="quiet">KL: mean KL(reference ‖ side). Each name leads to the report with every article.</p>'


def _short(side: dict[str, Any]) -> str:
    return side["label"].removeprefix("engine, ")
