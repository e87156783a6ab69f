"""Requests, ends, callbacks and timing of generation."""

from dataclasses import replace

import golden_sessions
import goldens
import pytest
import torch
from golden_sessions import GREEDY

from baichuan.errors import ConfigError
from baichuan.generation.requests import Timing

VERSION = "v1_7b"


@pytest.fixture(scope="module")
def session():
    return golden_sessions.session(VERSION, max_input_len=150, max_output_len=30)


@pytest.fixture(scope="module")
def prompt():
    return goldens.golden(VERSION)["ids_7"].tolist()


@pytest.fixture(scope="module")
def continuation():
    return goldens.golden(VERSION)["gen_7"].tolist()


def first_new(tokens, start=3):
    """A token that is new at its place, and the place."""
    return next((i, t) for i, t in enumerate(tokens) if i >= start and t not in tokens[:i])


@pytest.mark.parametrize("field", ["eos_id", "stop_ids"])
def test_an_end_id_ends_the_row_and_is_left_out(session, prompt, continuation, field):
    place, token = first_new(continuation)
    config = replace(GREEDY, **{field: token if field == "eos_id" else (token,)})
    result = session.generate([prompt], config, 24, keep_logits=True)[0]
    assert (result.ids, result.finish_reason) == (continuation[:place], "stop")
    assert result.logits.shape[0] == place + 1
    assert session.generate([prompt], config, place)[0].finish_reason == "length"


def test_rows_end_one_by_one_and_the_callback_hears_it(session, prompt, continuation):
    place, token = first_new(continuation)
    other = goldens.golden(VERSION)["ids_33"].tolist()
    heard = []
    config = replace(GREEDY, eos_id=token)
    results = session.generate([prompt, other], config, 24, on_tokens=heard.append)
    assert results[0].ids == continuation[:place]
    expected = goldens.golden(VERSION)["gen_33"].tolist()
    expected = expected[: expected.index(token)] if token in expected else expected
    assert results[1].ids == expected
    for row, result in enumerate(results):
        assert [step[row] for step in heard if step[row] is not None] == result.ids
    assert [step[0] for step in heard][place:] == [None] * (len(heard) - place)


@pytest.mark.parametrize(
    ("prompts", "changes", "new", "message"),
    [
        ([[1]] * 9, {}, 1, "max_batch_size 8"),
        ([], {}, 1, "max_batch_size 8"),
        ([[]], {}, 1, "prompt 0 is empty"),
        ([[1], [5] * 151], {}, 1, "prompt 1 has 151 tokens"),
        ([[1]], {}, 31, "max_output_len 31"),
        ([[1]], {}, 0, "max_output_len 0"),
        ([[1]], {"num_beams": 5}, 1, "max_beam_width 4"),
        ([[1000]], {}, 1, "id 1000"),
        ([[-1]], {}, 1, "id -1"),
    ],
)
def test_what_the_engine_cannot_hold_is_one_sentence(session, prompts, changes, new, message):
    with pytest.raises(ConfigError, match=message) as error:
        session.generate(prompts, replace(GREEDY, **changes), new)
    assert "\n" not in str(error.value)


def test_score_equals_the_logits_that_were_chosen_from(session, prompt, continuation):
    result = session.generate([prompt], GREEDY, 10, keep_logits=True)[0]
    scored = session.score([prompt + continuation[:9]])[0][len(prompt) - 1 :]
    torch.testing.assert_close(result.logits, scored, rtol=0, atol=goldens.FLOAT32_TOLERANCE)


def test_half_precision_logits_are_rounded(prompt):
    session = golden_sessions.session(VERSION, logits_dtype="float16")
    logits = session.generate([prompt], GREEDY, 2, keep_logits=True)[0].logits
    assert torch.equal(logits, logits.half().float())
    assert not torch.equal(logits, golden_sessions.session(VERSION).generate([prompt], GREEDY, 2, None, True)[0].logits)


def test_timing_counts(session, prompt):
    session.generate([prompt, prompt], GREEDY, 5)
    timing = session.timing
    assert (timing.prompt_tokens, timing.new_tokens, timing.decode_steps) == (14, 10, 4)
    assert timing.prefill_s > 0 and timing.decode_s > 0
    rate = 8 / timing.decode_s  # the steps made 8 tokens: the prefill made each sequence's first
    assert f"{14 / timing.prefill_s:.1f} tok/s; decode 4 steps, {rate:.1f} tok/s" in timing.summary()
    assert Timing(prompt_tokens=8, prefill_s=2.0).summary() == "prefill 8 tokens, 4.0 tok/s"  # one token needs no step
