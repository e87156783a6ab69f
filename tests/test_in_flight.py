"""Serving over the paged cache: requests of all kinds at once, each as if it were alone."""

from __future__ import annotations

import re
from dataclasses import replace

import golden_sessions
import goldens
import pytest
import torch
from golden_sessions import GREEDY, run

from baichuan.config import BuildConfig, QuantConfig, SamplingConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.kv_cache import PoolSettings
from baichuan.generation import pace, steps
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.generation.requests import Request
from baichuan.parallel.comm import Solo, run_ranks

SMALL_BLOCKS = PoolSettings(tokens_per_block=16)
LIMITS = BuildConfig(max_batch_size=4, max_beam_width=2, max_input_len=160, max_output_len=40)


def serving(version="v1_7b", policy=None, pool=SMALL_BLOCKS, comm=None, **limits) -> InFlight:
    comm, model = comm or Solo(), golden_sessions.model(version)
    weights = golden_sessions.weights(version, "float32", comm.rank, comm.world_size)
    executor = ReferenceExecutor(model, QuantConfig(), weights, comm, pool)
    return InFlight(executor, model, replace(LIMITS, **limits), policy)


def request(length, new=24, key=None, version="v1_7b", **settings):
    prompt = tuple(goldens.golden(version)[f"ids_{length}"].tolist())
    return Request(length if key is None else key, prompt, GREEDY, new, **settings)


def expected(length, new=24, version="v1_7b"):
    return goldens.golden(version)[f"gen_{length}"].tolist()[:new]


@pytest.mark.parametrize("policy", [Policy(), Policy(chunk_tokens=5), Policy(None)], ids=str)
@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
def test_the_original_codes_tokens_whatever_else_runs(version, policy):
    engine = serving(version, policy, max_num_tokens=40)
    for length in goldens.LENGTHS:
        engine.add(request(length, version=version))
    first, _ = run(engine, steps=3)
    for length in goldens.LENGTHS:
        engine.add(request(length, 9, -length, version))
    ids, last = run(engine)
    for length in goldens.LENGTHS:
        assert first.get(length, []) + ids[length] == expected(length, version=version)
        assert ids[-length] == expected(length, 9, version)
    assert {each.finish_reason for each in last.values()} == {"length"}
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


def one_step_ahead(engine):
    """The engine with a host that reads a step's tokens when the next has been launched, as it does of a GPU."""
    assert not engine.reads_late
    engine.reads_late = True
    return engine


def alone(each, **kinds):
    engine = serving(**kinds)
    engine.add(each)
    ids, last = run(engine)
    return ids[each.key], last[each.key]


def mixture():
    """Requests of every kind, with settings of their own."""
    drawn = SamplingConfig(top_k=20, top_p=0.9, temperature=1.5, repetition_penalty=1.2, eos_id=-1)
    settings = [
        GREEDY,
        replace(drawn, random_seed=3),
        replace(drawn, random_seed=4, top_k=0),
        replace(GREEDY, num_beams=2),
        replace(drawn, random_seed=3, temperature=0.7, repetition_penalty=1.0),
        replace(GREEDY, repetition_penalty=1.3, stop_ids=tuple(range(0, 1000, 7))),
        replace(GREEDY, num_beams=2, temperature=2.0),
    ]
    lengths = (1, 7, 7, 7, 1, 33, 1)
    requests = [request(length, 24 + n, n, keep_logits=n % 2 == 0) for n, length in enumerate(lengths)]
    return [replace(each, sampling=sampling) for each, sampling in zip(requests, settings, strict=True)]


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
@pytest.mark.parametrize("blocks", [None, 13], ids=["room for all", "some give up their blocks"])
def test_each_request_is_what_it_is_alone(blocks, late):
    """Settings, seeds, ends, limits, beams and kept logits; with few blocks, too, where some are computed twice."""
    engine = serving(pool=replace(SMALL_BLOCKS, most_blocks=blocks), policy=Policy(chunk_tokens=30))
    if late:
        one_step_ahead(engine)
    for each in mixture():
        engine.add(each)
    ids, last = run(engine)
    assert (engine.scheduler.preemptions > 0) == (blocks is not None)
    for each in mixture():
        alone_ids, alone_last = alone(each)
        assert (ids[each.key], last[each.key].finish_reason) == (alone_ids, alone_last.finish_reason)
        if each.keep_logits:
            torch.testing.assert_close(last[each.key].logits, alone_last.logits, rtol=0, atol=1e-4)
    assert len({tuple(each) for each in ids.values()}) == len(ids)
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


def test_tokens_that_nobody_needs_yet_are_not_kept_for_ever():
    """Requests of one token each leave theirs behind; rows that decode later find their own."""
    engine = one_step_ahead(serving(policy=Policy(None)))
    for key in range(steps.MOST_PENDING + 5):
        engine.add(request(7, 1, key))
        run(engine)
        assert len(engine._steps._newer) <= steps.MOST_PENDING + 1
    assert len(engine._steps._newer) > 1, "they are kept apart for a while"
    for length in (7, 33):
        engine.add(request(length))
        first, _ = run(engine, steps=2)
    ids, _ = run(engine)
    assert first.get(33, []) + ids[33] == expected(33) and ids[7][-10:] == expected(7)[-10:]


def test_equal_beginnings_are_computed_once():
    engine, off = serving(), serving(policy=Policy(prefix_caching=False))
    for each in (engine, off):
        each.add(request(128))
        run(each)
        each.add(request(128, key="again"))
        assert run(each)[0]["again"] == expected(128)
    assert engine.scheduler.shared_tokens == 112, "of 128 tokens, whole blocks of 16, and the last is computed"
    assert off.scheduler.shared_tokens == 0


def test_prompts_are_scored_and_continued():
    engine, golden = serving(policy=Policy(chunk_tokens=20)), goldens.golden("v1_7b")
    engine.add(request(33, 20))
    engine.step()
    engine.add(request(128, 0, "scored", prompt_logits=True))
    engine.add(request(128, 5, "both", prompt_logits=True, keep_logits=True))
    ids, last = run(engine)
    assert ids["scored"] == [] and last["scored"].finish_reason == "length"
    assert (last["scored"].logits - golden["logits_128"]).abs().max() < goldens.FLOAT32_TOLERANCE
    rows = torch.cat([golden["logits_128"], golden["gen_logits_128"][1:5]])
    assert (last["both"].logits - rows).abs().max() < goldens.FLOAT32_TOLERANCE


def test_a_cancelled_request_ends_at_once_and_frees_its_blocks():
    engine = serving(max_beam_width=1)
    for length in goldens.LENGTHS:
        engine.add(request(length))
    engine.add(request(7, key="waits"))
    engine.step()
    held = engine.scheduler.pool.free
    for key in (128, "waits", "unknown"):
        engine.cancel(key)
    assert engine.scheduler.pool.free == held + 8
    ids, last = run(engine)
    assert {key for key, each in last.items() if each.finish_reason == "cancelled"} == {128, "waits"}
    assert all(ids[length] == expected(length)[-len(ids[length]) :] for length in (1, 7, 33))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "is empty"),
        ({"prompt": (5,) * 161}, "161 tokens"),
        ({"prompt": (1000,)}, "id 1000"),
        ({"max_new_tokens": 41}, "max_output_len 41"),
        ({"sampling": replace(GREEDY, num_beams=3)}, "max_beam_width 2"),
        (
            {"prompt": (5,) * 160, "sampling": replace(GREEDY, num_beams=2)},
            "up to 24 blocks of 16 tokens and .* has 13",
        ),
    ],
)
def test_a_request_that_cannot_be_held_fails_alone(changes, message):
    engine = serving(pool=replace(SMALL_BLOCKS, most_blocks=13))
    engine.add(request(7))
    engine.add(replace(request(7, key="bad"), **changes))
    ids, last = run(engine)
    assert ids[7] == expected(7)
    assert re.search(message, last["bad"].error) and "\n" not in last["bad"].error


def test_ranks_decide_alike():
    def generate(comm):
        engine = serving(comm=comm, pool=replace(SMALL_BLOCKS, most_blocks=13), policy=Policy(chunk_tokens=30))
        for each in mixture():
            engine.add(each)
        return run(engine)[0], engine.scheduler.preemptions

    first, second = run_ranks(2, generate)
    assert first == second and first[1] > 0
    assert first[0][0] == expected(1)


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_times_and_steps_are_counted(late):
    engine = one_step_ahead(serving(policy=Policy(None))) if late else serving(policy=Policy(None))
    for length in (7, 33):
        engine.add(request(length, 5))
    news = [engine.step()]
    while engine.unfinished:
        news.append(engine.step())
    timing = engine.timing
    assert (timing.prompt_tokens, timing.new_tokens) == (40, 10)
    assert (timing.decode_steps, timing.decode_tokens) == (4, 8)
    assert timing.prefill_s > 0 and timing.decode_s > 0
    assert [len(each) for each in news] == ([0, 2, 2, 2, 2, 2] if late else [2] * 5)


def test_a_step_in_vain_does_not_count_for_the_next_request():
    """An end id is read when the next step runs already, whose tokens then nobody reads."""
    engine, ids = one_step_ahead(serving()), expected(7)
    place, end = next((n, token) for n, token in enumerate(ids) if n > 2 and token not in ids[:n])
    engine.add(replace(request(7, 24), sampling=replace(GREEDY, eos_id=end)))
    assert run(engine)[0][7] == ids[:place]
    engine.add(request(33, 3, "next"))
    assert run(engine)[0]["next"] == expected(33, 3)
    assert (engine.timing.decode_steps, engine.timing.decode_tokens, engine.timing.new_tokens) == (2, 2, 3)


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_after_an_interrupted_step_nothing_of_it_is_believed(late, monkeypatch):
    """Ctrl-C within a step: its blocks have names already and hold nothing."""
    engine = one_step_ahead(serving()) if late else serving()
    engine.add(request(33, keep_logits=True))
    first, _ = run(engine, steps=4)
    engine.add(request(128))
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(engine._executor, "forward", interrupted)
        engine.step()
    engine.cancel(128)
    engine.add(request(128, key="again"))
    ids, last = run(engine)
    assert ids["again"] == expected(128)
    assert first[33] + ids[33] == expected(33)
    kept = goldens.golden("v1_7b")["gen_logits_33"]
    assert (last[33].logits - kept).abs().max() < goldens.FLOAT32_TOLERANCE
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks


def interrupted(step):
    raise KeyboardInterrupt


def test_there_is_time_for_requests_until_shortly_before_a_step_ends(monkeypatch):
    """Steps of 20 ms that the host plans in 2 ms; those with prompts, which take longer, do not count."""
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    engine = one_step_ahead(serving(max_batch_size=1))
    engine.add(request(7, 30))
    for step in range(pace.REMEMBERED + 3):
        assert engine.spare_s == 0, "too little is known"
        engine.step()
        engine._pace.launched(0.002)
        clock[0] += 0.02 if step else 0.05
    engine.step()
    assert engine.spare_s == pytest.approx(0.02 - 0.002 - pace.MARGIN_S)
    clock[0] += 0.03
    assert engine.spare_s == 0
    clock[0] -= 0.03
    engine.add(request(7, 30, key="another"))
    assert engine.spare_s == 0, "nobody else could join while one waits"
    engine.reads_late = False
    assert engine.spare_s == 0
