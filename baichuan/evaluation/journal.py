"""Running an evaluation to its end: progress, printed output, and results saved on the way."""

from __future__ import annotations

import logging
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

from baichuan.evaluation import report
from baichuan.evaluation.summary import Evaluation
from baichuan.evaluation.text_table import WIDTH
from baichuan.evaluation.wording import agreement_text, conditions_text, speed_text
from baichuan.text.printable import printable
from baichuan.util.progress import Progress
from baichuan.util.signals import Terminated

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # the folder of a report that is not to replace a complete one
SAVING_SHARE = 0.05  # at most this share of the time is spent on saving intermediate results


def run_all(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path | None) -> None:
    """Run every batch; save complete ones on the way and at the end, after Ctrl-C or SIGTERM too."""
    next_save = 0.0
    try:
        evaluation.warm_up()
        batches = evaluation.batches()
        with Progress("summarising", sum(map(len, batches)), "article") as progress:
            for tasks in batches:
                evaluation.run(tasks)
                if len(evaluation.done) == 1:
                    progress.clear()
                    show_first(evaluation)
                if output_dir and time.monotonic() >= next_save and len(evaluation.done) < len(batches):
                    start = time.monotonic()
                    save(evaluation, settings, output_dir, complete=False)
                    next_save = time.monotonic() + (time.monotonic() - start) / SAVING_SHARE
                progress.advance(len(tasks))
    except (KeyboardInterrupt, Terminated):
        if evaluation.done:
            finish(evaluation, settings, output_dir, complete=False)
        raise
    finish(evaluation, settings, output_dir, complete=True)


def show_first(evaluation: Evaluation) -> None:
    sample = evaluation.samples[0]
    print(printable(f"Article: {sample.task.sample.article}\n\nHighlights: {sample.task.sample.highlights}\n"))
    alike: dict[str, list[str]] = {}
    for side in evaluation.sides:
        alike.setdefault(sample.summaries[side.key].text, []).append(side.label)
    for text, labels in alike.items():
        names = "all sides" if len(labels) == len(evaluation.sides) > 2 else "; ".join(labels)
        print(printable(f"Summary ({names}): {text}\n"), flush=True)


def save(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path, complete: bool) -> Path:
    """Save all complete batches; returns the page to read first.

    Only a complete report replaces a complete one; until then this one is in the folder UNFINISHED.
    """
    if not complete and report.is_complete(output_dir):
        output_dir = output_dir / UNFINISHED
        output_dir.mkdir(exist_ok=True)
    elif complete and (output_dir / UNFINISHED / report.RESULTS_NAME).is_file():
        shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)
    samples = [report.sample_values(sample) for sample in evaluation.samples]
    return report.write(output_dir, report.results(evaluation, settings, complete), samples)[0]


def finish(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path | None, complete: bool) -> None:
    """Print the figures; save them if there is a folder."""
    values = report.results(evaluation, settings, complete)
    of = "" if complete else f" of {len(evaluation.tasks)}, the run was stopped"
    print(f"{values['articles']} articles{of}; {settings['decoding']}; ROUGE in percent with 95 % intervals")
    print(printable(report.figures_table(values)))
    two = values["sides"][0] if len(values["sides"]) == 2 else None
    for sentence in (conditions_text(values), speed_text(values), two and agreement_text(values, two)):
        if sentence:
            print(printable(textwrap.fill(sentence, WIDTH)), flush=True)
    if output_dir:
        page = save(evaluation, settings, output_dir, complete)
        logger.info("results and summaries are in %s; the report is %s", page.parent, page)
