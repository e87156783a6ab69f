"""The output of an evaluation: results.json, summaries.jsonl, HTML pages, and a table for the terminal.

python -m baichuan.evaluation.report A/results.json B/results.json prints the table of several runs.
"""

from __future__ import annotations

from baichuan.util.signals import end_quietly

if __name__ == "__main__":
    end_quietly()  # it changes nothing that would have to be put in order

import json
import math
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from baichuan import __version__
from baichuan.errors import BaichuanError, ConfigError
from baichuan.evaluation import html_index, html_report
from baichuan.evaluation.rouge import KINDS, LABELS
from baichuan.evaluation.summary import Evaluation, SampleResult
from baichuan.evaluation.text_table import table
from baichuan.evaluation.wording import report_title, shown
from baichuan.text.printable import printable, sentence
from baichuan.util.files import read_at_most
from baichuan.util.publishing import publish_folder, staged_folder
from baichuan.util.streams import printing

FORMAT = 2
RESULTS_NAME, SUMMARIES_NAME, INDEX_NAME = "results.json", "summaries.jsonl", "index.html"
MAX_RESULTS_BYTES = 16 << 20
PACKAGES = ("torch", "transformers", "sentencepiece", "evaluate", "rouge_score", "datasets", "numpy", "triton")
FIGURES = {  # field of SideFigures: (label, format)
    "perplexity": ("perplexity", ".4f"),
    "latency_s": ("total latency, s", ".3f"),
    "tokens_per_s": ("tokens/s", ".1f"),
}
# Runs that differ in one of these settings cannot be compared.
COMPARED_SETTINGS = ("dataset", "output_len", "max_input_length", "sampling", "scored_tokens_limit")


def versions() -> dict[str, str]:
    """This package, Python and the libraries that the figures depend on; those that are not installed are left out."""
    found = {"baichuan": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def results(evaluation: Evaluation, settings: dict[str, Any], complete: bool) -> dict[str, Any]:
    """Every figure as JSON values; at least one batch is complete.  NaN and infinity become text."""
    sides = [
        {"key": side.key, "label": side.label, **side.facts, **asdict(evaluation.figures(side.key))}
        for side in evaluation.sides
    ]
    return _json_value(
        {
            "format": FORMAT,
            "complete": complete,  # False: the run was stopped, and the figures cover the batches completed before
            "batches": len(evaluation.done),
            "articles": len(evaluation.samples),
            "articles_cut": sum(sample.task.left_out > 0 for sample in evaluation.samples),
            "scored_tokens": evaluation.scored_tokens,
            "sides": sides,
            "reference": evaluation.reference,  # key of the side that the others' "agreement" is measured against
            "settings": settings,
            "versions": versions(),
        }
    )


def sample_values(sample: SampleResult) -> dict[str, Any]:
    """One article and its summaries as JSON values."""
    return {
        "id": sample.task.sample.id,
        "article": sample.task.sample.article,
        "highlights": sample.task.sample.highlights,
        "prompt_tokens": len(sample.task.prompt),
        "left_out_tokens": sample.task.left_out,
        "summaries": {key: asdict(summary) for key, summary in sample.summaries.items()},
    }


def write(folder: Path, values: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the files in one step; returns the page to read first, then those that it links to.

    values: from results(); samples: from sample_values()
    """
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    sides = [side for side in values["sides"] if side["key"] != values["reference"]]
    links = {side["key"]: page_name(side) for side in sides}
    pages = {links[side["key"]]: html_report.page(values, samples, side) for side in sides}
    if len(pages) > 1:
        pages = {INDEX_NAME: html_index.page(values, links), **pages}
    contents = {
        RESULTS_NAME: json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n",
        SUMMARIES_NAME: lines,
        **pages,
    }
    with staged_folder(folder) as staged:
        for name, content in contents.items():
            (staged / name).write_text(content, encoding="utf-8")
        publish_folder(staged, folder, _pages_of(folder), RESULTS_NAME)
    return [folder / name for name in pages]


def _pages_of(folder: Path) -> set[str]:
    """The pages of the report in this folder, none if there is no readable one."""
    try:
        return {INDEX_NAME, *(page_name(side) for side in read_results(folder / RESULTS_NAME)["sides"])}
    except (ConfigError, LookupError, TypeError):
        return set()


def page_name(side: dict[str, Any]) -> str:
    """The file name of a side's report, made from its title."""
    return re.sub(r"\W+", "-", report_title(side).lower()).strip("-") + ".html"


def read_results(path: Path) -> dict[str, Any]:
    """The values of a results.json from write().  Raises ConfigError for any other file."""
    try:
        values = json.loads(read_at_most(path, MAX_RESULTS_BYTES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); run summarize.py with --output_dir") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); run summarize.py again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConfigError(f"{path} was not written by this summarize.py; run it again")
    try:
        comparison_table([values])
        check_comparable([values, values])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ConfigError(f"{path} was changed after summarize.py wrote it ({reason}); run it again") from None
    return values


def is_complete(folder: Path) -> bool:
    """Whether the folder holds the report of a run that came to its end."""
    try:
        return read_results(folder / RESULTS_NAME).get("complete") is True
    except ConfigError:
        return False


def figures_table(values: dict[str, Any]) -> str:
    """Every figure, one column per side; of more than two sides, comparison_table.  values: from results()"""
    sides = values["sides"]
    if len(sides) > 2:
        return comparison_table([values])
    rows = []
    for kind in KINDS:
        scores = [side["rouge"][kind] for side in sides]
        rows.append([LABELS[kind], *(f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in scores)])
    for name, (label, spec) in FIGURES.items():
        rows.append([label, *(shown(side[name], spec) for side in sides)])
    rows.append(["weights, MB", *(_megabytes(side) for side in sides)])
    return table(["", *(side["label"] for side in sides)], rows)


def comparison_table(runs: Sequence[dict[str, Any]]) -> str:
    """One line per side of every run; a transformers model in several runs stands once.  runs: from results()"""
    header = ["", "ROUGE-1", "ROUGE-L", "perplexity", "KL to HF, nats", "same text", "tokens/s", "weights, MB"]
    rows: dict[Any, list[str]] = {}
    for number, run in enumerate(runs):
        for side in run["sides"]:
            agreement = side["agreement"]
            row = [
                side["label"],
                *(f"{side['rouge'][kind]['value']:.2f}" for kind in ("rouge1", "rougeL")),
                shown(side["perplexity"], FIGURES["perplexity"][1]),
                shown(agreement and agreement["mean_kl"], ".2e"),
                f"{agreement['identical_summaries']} of {run['articles']}" if agreement else "–",
                shown(side["tokens_per_s"], FIGURES["tokens_per_s"][1]),
                _megabytes(side),
            ]
            rows.setdefault(side["label"] if side["key"] == "hf" else (number, side["key"]), row)
    return table(header, list(rows.values()))


def check_comparable(runs: Sequence[dict[str, Any]]) -> None:
    """Raise ConfigError unless the runs were over the same articles with the same settings."""
    for run in runs[1:]:
        for name in COMPARED_SETTINGS:
            mine, other = run["settings"].get(name), runs[0]["settings"].get(name)
            if mine != other:
                raise ConfigError(f"{name} is {other} in one run and {mine} in another; compare runs that agree in it")
        if run["articles"] != runs[0]["articles"]:
            raise ConfigError(
                f"one run is over {runs[0]['articles']} articles and another over {run['articles']}; "
                "compare runs over the same ones"
            )


def main(paths: Sequence[str]) -> int:
    with printing("report"):
        return _compare(paths)


def _compare(paths: Sequence[str]) -> int:
    try:
        runs = [read_results(Path(path)) for path in paths]
        check_comparable(runs)
    except BaichuanError as error:
        print(f"report: error: {sentence(str(error))}", file=sys.stderr)
        return 2
    print(printable(comparison_table(runs)))
    return 0


def _megabytes(side: dict[str, Any]) -> str:
    return f"{side['bytes'] / 1e6:.1f}"


def _json_value(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON lacks, as text."""
    match value:
        case dict():
            return {key: _json_value(each) for key, each in value.items()}
        case list() | tuple():
            return [_json_value(each) for each in value]
        case float():
            return value if math.isfinite(value) else str(value)
        case _:
            return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
