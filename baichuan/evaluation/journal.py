"""Running an evaluation to its end: progress, what is printed, what is saved on the way."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from baichuan.evaluation import report
from baichuan.evaluation.summary import Evaluation
from baichuan.evaluation.wording import agreement_text
from baichuan.util.progress import Progress

logger = logging.getLogger(__name__)

SAVING_SHARE = 0.05  # of the time, at most, goes into saving what is there so far


def run_all(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path | None, shows: bool) -> None:
    """Every batch.  What is complete is saved on the way and, also after Ctrl-C, at the end.

    Every rank calls it; rank 0 alone passes shows=True and, to save, an output_dir.
    """
    next_save = 0.0
    try:
        evaluation.warm_up()
        batches = evaluation.batches()
        with Progress("summarising", sum(map(len, batches)), "article") as progress:
            for tasks in batches:
                evaluation.run(tasks)
                if shows and len(evaluation.done) == 1:
                    show_first(evaluation)
                if output_dir and time.monotonic() >= next_save and len(evaluation.done) < len(batches):
                    start = time.monotonic()
                    save(evaluation, settings, output_dir, complete=False)
                    next_save = time.monotonic() + (time.monotonic() - start) / SAVING_SHARE
                progress.advance(len(tasks))
    except KeyboardInterrupt:
        if shows and evaluation.done:
            finish(evaluation, settings, output_dir, complete=False)
        raise
    if shows:
        finish(evaluation, settings, output_dir, complete=True)


def show_first(evaluation: Evaluation) -> None:
    sample = evaluation.samples[0]
    print(f"Article: {sample.task.sample.article}\n\nHighlights: {sample.task.sample.highlights}\n")
    for side in evaluation.sides:
        print(f"Summary ({side.label}): {sample.summaries[side.key].text}\n", flush=True)


def save(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path, complete: bool) -> None:
    samples = [report.sample_values(sample) for sample in evaluation.samples]
    report.write(output_dir, report.results(evaluation, settings, complete), samples)


def finish(evaluation: Evaluation, settings: dict[str, Any], output_dir: Path | None, complete: bool) -> None:
    """Print the figures; save them if there is a folder."""
    values = report.results(evaluation, settings, complete)
    of = "" if complete else f" of {len(evaluation.tasks)}, the run was stopped"
    print(f"{values['articles']} articles{of}; {settings['decoding']}; ROUGE in percent with 95 % intervals")
    print(report.figures_table(values["sides"]), flush=True)
    if sentence := agreement_text(values):
        print(sentence, flush=True)
    if output_dir:
        save(evaluation, settings, output_dir, complete)
        logger.info("results, summaries and report are in %s", output_dir)
