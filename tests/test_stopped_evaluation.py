"""An evaluation that is stopped keeps what it had, and says on the way how long it will take."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from bigram_side import BigramSide, evaluation_of
from evaluations import GREEDY, SHORT, rouge

from baichuan.evaluation.journal import run_all
from baichuan.evaluation.request import Request
from baichuan.evaluation.summary import Evaluation
from baichuan.util import progress

SETTINGS = {"dataset": "d", "batch_size": 2, "output_len": 5, "max_input_length": 9, "decoding": "greedy"}


def interrupted(folder: Path, at_call: int) -> Evaluation:
    def interrupt(call: int) -> None:
        if call == at_call:
            raise KeyboardInterrupt

    sides = [BigramSide("engine", 1), BigramSide("hf", 2, before=interrupt)]
    evaluation = evaluation_of(sides, SHORT, Request(GREEDY, 2, 20, 5, 9, eval_ppl=True), rouge(), scoring=True)
    with pytest.raises(KeyboardInterrupt):
        run_all(evaluation, SETTINGS, folder)
    return evaluation


def test_ctrl_c_keeps_the_complete_batches_on_both_sides(tmp_path, capsys):
    evaluation = interrupted(tmp_path, at_call=3)  # the warm-up, two batches, and in the third after the engine's work
    assert len(evaluation.samples) == 4
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["complete"] is False and values["articles"] == 4
    assert all(side["new_tokens"] == 4 * 5 for side in values["sides"])
    out = capsys.readouterr().out
    assert "4 articles of 5, the run was stopped" in out and "ROUGE-1" in out
    assert len((tmp_path / "summaries.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_before_the_first_batch_leaves_nothing(tmp_path, capsys):
    interrupted(tmp_path, at_call=1)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_killed_run_leaves_what_was_saved_on_the_way(tmp_path):
    """What is on the disk while the second batch runs."""
    seen = []

    def look(call: int) -> None:
        if call == 2:
            seen.append(json.loads((tmp_path / "results.json").read_text()))

    side = BigramSide("engine", before=look)
    evaluation = evaluation_of([side], SHORT, Request(GREEDY, 2, 20, 5, 9), rouge(), scoring=False)
    run_all(evaluation, SETTINGS, tmp_path)
    assert (seen[0]["complete"], seen[0]["articles"]) == (False, 2)
    values = json.loads((tmp_path / "results.json").read_text())
    assert (values["complete"], values["articles"]) == (True, 5)


def test_progress_says_how_long_it_will_take(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="baichuan")
    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", (0.0,))
    evaluation = evaluation_of([BigramSide("engine")], SHORT, Request(GREEDY, 2, 20, 5, 9), rouge(), scoring=False)
    run_all(evaluation, SETTINGS, None)
    lines = [record.message for record in caplog.records if "summarising" in record.message]
    assert lines and all("s left" in line for line in lines) and "summarising: 40 %" in lines[0]
