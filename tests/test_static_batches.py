"""Serving by one static batch after another."""

from __future__ import annotations

from dataclasses import replace

import golden_sessions
import goldens
import pytest
import torch
from golden_sessions import GREEDY, run
from row_executor import static_session

from baichuan.generation.requests import Request
from baichuan.generation.static_batches import StaticBatches

VERSION = "v2_13b"


@pytest.fixture
def serving() -> StaticBatches:
    return StaticBatches(static_session(VERSION, max_batch_size=2, max_input_len=128, max_output_len=30))


def request(length: int, new: int = 24, **settings) -> Request:
    prompt = tuple(goldens.golden(VERSION)[f"ids_{length}"].tolist())
    return Request(length, prompt, GREEDY, new, **settings)


def expected(length: int, new: int = 24) -> list[int]:
    return goldens.golden(VERSION)[f"gen_{length}"].tolist()[:new]


def test_each_row_has_a_limit_of_its_own(serving):
    for length, new in zip(goldens.LENGTHS, (24, 3, 9, 1), strict=True):
        serving.add(request(length, new))
    ids, last = run(serving)
    assert ids == {n: expected(n, new) for n, new in zip(goldens.LENGTHS, (24, 3, 9, 1), strict=True)}
    assert {each.finish_reason for each in last.values()} == {"length"}
    assert serving.timing.decode_steps == 23 + 8, "two batches, each as long as its longest row"
    assert serving.timing.prompt_tokens == sum(goldens.LENGTHS)


def test_a_request_that_cannot_be_held_fails_alone(serving):
    serving.add(Request("long", (5,) * 129, GREEDY, 4))
    serving.add(request(7))
    serving.add(Request("beams", (5,), replace(GREEDY, num_beams=8), 4))
    ids, last = run(serving)
    assert ids[7] == expected(7)
    assert "129 tokens" in last["long"].error and "max_beam_width 4" in last["beams"].error
    assert "\n" not in last["long"].error


def test_cancelled_while_it_waits_and_while_it_runs(serving):
    for length in (7, 33, 128):
        serving.add(request(length))
    heard = [progress for _ in range(4) for progress in serving.step()]
    serving.cancel(128)
    serving.cancel(7)
    serving.cancel("never added")
    ids, last = run(serving)
    assert (last[7].finish_reason, last[128].finish_reason, ids[7], ids[128]) == ("cancelled", "cancelled", [], [])
    assert heard and [*(t for p in heard if p.key == 33 for t in p.new_ids), *ids[33]] == expected(33)
    serving.add(request(7))
    assert run(serving)[0][7] == expected(7)


@pytest.mark.parametrize(("new", "keep"), [(0, False), (4, False), (4, True)])
def test_the_prompts_logits_come_with_the_last_progress(serving, new, keep):
    serving.add(request(33, new, prompt_logits=True, keep_logits=keep))
    ids, last = run(serving)
    golden = goldens.golden(VERSION)
    wanted = torch.cat((golden["logits_33"], golden["gen_logits_33"][1 : new if keep else 1]))
    torch.testing.assert_close(last[33].logits, wanted, rtol=0, atol=goldens.FLOAT32_TOLERANCE)
    assert ids[33] == expected(33, new)


def test_beams_run_with_their_like(serving):
    beams = replace(request(7, 6), sampling=replace(GREEDY, num_beams=2))
    for key, each in enumerate(
        (beams, request(33, 4), replace(beams, sampling=replace(beams.sampling, random_seed=1)))
    ):
        serving.add(replace(each, key=key))
    ids, _ = run(serving)
    [alone] = golden_sessions.session(VERSION).generate([beams.prompt], beams.sampling, 6)
    assert ids[0] == ids[2] == alone.ids and ids[1] == expected(33, 4)


def test_a_batch_that_is_interrupted_ends_with_an_error_and_the_next_begins(serving, monkeypatch):
    for length in (7, 33, 128):
        serving.add(request(length))
    serving.step()
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(serving._session.executor, "forward", interrupted)
        serving.step()
    ids, last = run(serving, steps=60)
    assert serving.unfinished == 0 and ids[128] == expected(128)
    assert "interrupted" in last[7].error and "interrupted" in last[33].error


def interrupted(step):
    raise KeyboardInterrupt
