"""What the Python interface refuses: each in one sentence, and nothing else is spoilt."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from api_goldens import GREEDY, VERSION, continuations, prompts

from baichuan import LLM, SamplingConfig
from baichuan.errors import BaichuanError, ConfigError, UnsupportedError

MESSAGE = {"role": "user", "content": "你好"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    return LLM(scripts.built(tmp_path_factory.mktemp("engine"), VERSION))


@pytest.mark.timeout(30)
def test_lengths_are_integers(llm):
    for given in (2.5, "3", float("nan")):
        with pytest.raises(ConfigError, match="is no integer; give a number of tokens"):
            llm.generate("hi", GREEDY, given)
    with pytest.raises(ConfigError, match=r"top_k 1\.5 is no integer"):
        SamplingConfig(top_k=1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([[1], [5] * 129], GREEDY, 1), "^prompt 1: the prompt has 129 tokens"),
        (lambda llm: llm.generate([[1], []], GREEDY, 1), "^prompt 1: the prompt is empty"),
        (lambda llm: llm.generate([[1]], GREEDY, 25), "^max_new_tokens 25 is out of the engine's range 1 to 24"),
        (lambda llm: llm.stream([1], GREEDY, 25), "^max_new_tokens 25 is out"),
        (lambda llm: llm.chat([MESSAGE], GREEDY, 0), "^max_new_tokens 0 is out"),
        (lambda llm: llm.requests([[1]], GREEDY, 25), "^max_output_len 25 is out"),
        (lambda llm: llm.generate([[1]], replace(GREEDY, num_beams=3), 1), "max_beam_width 2"),
        (lambda llm: llm.generate([[1]], [GREEDY, GREEDY], 1), "2 settings for 1 prompts"),
        (lambda llm: llm.score([[7]]), "a text of 1 token has no probability"),
        (lambda llm: next(llm.stream([1000], GREEDY, 1)), "id 1000"),
        (lambda llm: llm.chat([{"role": "user"}]), "needs a role and a content"),
        (lambda llm: llm.chat("hi"), "chat takes a list of messages"),
        (lambda llm: llm.chat([7, 8]), "message 0 of the chat is 7"),
        (lambda llm: llm.chat([]), "the chat has no message"),
        (lambda llm: llm.generate([{"role": "user", "content": "x"}, None]), "message 1 of the chat is None"),
        (lambda llm: llm.generate(b"hi"), "a prompt is byte"),
        (lambda llm: llm.generate(bytearray(b"hi")), "a prompt is byte"),
        (lambda llm: llm.generate([b"hi"]), "a prompt is byte"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_the_next_call_works(llm, call, message):
    with pytest.raises(BaichuanError, match=message) as error:
        call(llm)
    assert "\n" not in str(error.value)
    assert llm.generate(prompts()[1], GREEDY, 3)[0].ids == continuations()[1][:3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"^a prompt is NoneType \(None\); give a text, a list of token ids, or a list of a chat's messages$"),
        (5, r"^a prompt is int \(5\)"),
        (float("nan"), r"^a prompt is float \(nan\)"),
        (torch.tensor(5), r"^a prompt is int \(5\)"),
        (MESSAGE, r"^a prompt is dict \({'role'"),
        ([1.0, 2.0], r"^prompt 0: a prompt is float \(1.0\)"),
        (np.ones(3), r"^prompt 0: a prompt is float \(1.0\)"),
        ([True, False], r"^prompt 0: a prompt is bool \(True\)"),
        (torch.tensor([True]), r"^a prompt is bool \(True\)"),
        ([None], r"^a prompt is NoneType"),
        (["hi", None], r"^prompt 1: a prompt is NoneType"),
        ([[1.0, 2.0]], r"^the prompt holds 1.0, which is no token id; give integers$"),
        ([[5], [5, True]], r"^prompt 1: the prompt holds True, which is no token id"),
        ([5, "a"], r"^the prompt holds 'a', which is no token id"),
        (["hi", "a\udc80"], r"^prompt 1: the text is not valid UTF-8"),
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_runs(llm, given, message, monkeypatch):
    monkeypatch.setattr(llm, "_run", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ConfigError, match=message):
        llm.generate(given, GREEDY, 1)
    with pytest.raises(
        ConfigError, match="a prompt is|the prompt holds .*, which is no token id"
    ):  # here a list is one prompt
        llm.stream(given, GREEDY, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("hi", {"top_k": 1}), r"^sampling {'top_k': 1} is no SamplingConfig"),
        (lambda llm: llm.generate("hi", [None]), r"^sampling \[None\] is no SamplingConfig"),
        (lambda llm: llm.generate("hi", 5), "^sampling 5 is no SamplingConfig"),
        (
            lambda llm: llm.generate([[1], [5]], [GREEDY, replace(GREEDY, num_beams=3)]),
            "^prompt 1: num_beams 3 exceeds",
        ),
        (lambda llm: llm.generate("hi", GREEDY, True), "^max_new_tokens True is no integer"),
        (lambda llm: llm.generate("hi", stop_texts=5), "^stop_texts 5 is no text and no list of texts"),
        (lambda llm: llm.generate("hi", stop_texts=["a", 5]), r"^stop_texts \['a', 5\] is no text"),
        (lambda llm: llm.generate("hi", stop_texts=b"x"), "^stop_texts b'x' is no text"),
        (lambda llm: llm.chat(None), "^a chat takes a list of messages and this is None"),
        (lambda llm: llm.chat(MESSAGE), "^a chat takes a list of messages"),
        (lambda llm: llm.chat([]), "^the chat has no message"),
        (lambda llm: llm.score(None), "^a prompt is NoneType"),
        (lambda llm: llm.score([prompts()[1], [5.0]]), "^text 1: the text holds 5.0, which is no token id"),
        (lambda llm: llm.score([prompts()[1], [7]]), "^text 1: a text of 1 token has no probability"),
        (lambda llm: llm.logits(5), r"^a prompt is int \(5\)"),
        (lambda _: LLM(None), "^engine_dir None is no path"),
        (lambda llm: llm.generate("hi", keep_logits="x"), "^keep_logits 'x' is not known; use one of True, False"),
        (lambda llm: llm.stream("hi", keep_logits=None), "^keep_logits None is not known; use one of True, False"),
        (lambda llm: llm.stream("hi", stopped=5), "^stopped 5 cannot be called; give a function without parameters"),
        (lambda llm: llm.lead(5), "^body 5 cannot be called; give a function without parameters"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(llm, call, message, monkeypatch):
    monkeypatch.setattr(llm, "_run", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ConfigError, match=message):
        call(llm)


@pytest.mark.parametrize("wrong", [None, "x", float("nan"), float("inf"), True, [1], 1j, ("a",), (True,), (5.0,)])
@pytest.mark.parametrize("name", [field.name for field in fields(SamplingConfig)])
def test_settings_are_numbers(name, wrong):
    with pytest.raises(ConfigError, match=r"(is no (integer|number|list of token ids)|is out of range); (give|use) "):
        SamplingConfig(**{name: (wrong, wrong) if name == "stop_ids" else wrong})
    assert SamplingConfig(**{name: [5, np.int64(6)] if name == "stop_ids" else 1})


@pytest.mark.parametrize("wrong", [5, None, "5", b"x"])
def test_stop_ids_are_a_list(wrong):
    with pytest.raises(ConfigError, match="is no list of token ids; give one, such as"):
        SamplingConfig(stop_ids=wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "^device 'gpu' is not known; use one of auto, cpu, cuda$"),
        ({"device": 3}, "^device 3 is not known"),
        ({"device": ["cpu"]}, r"^device \['cpu'\] is not known"),
        ({"device": np.array(["cpu", "auto"])}, r"^device array\(.*\) is not known"),
        ({"prefix_caching": "no"}, "^prefix_caching 'no' is not known; use one of True, False$"),
        ({"keep_copies": "x"}, "^keep_copies 'x' is not known; use one of True, False$"),
        ({"tokenizer_dir": ""}, "^tokenizer_dir '' is no path; give a checkpoint's folder or hub id, or None$"),
        ({"tokenizer_dir": 3}, "^tokenizer_dir 3 is no path"),
        ({"tokenizer_dir": "a\0b"}, r"^tokenizer_dir 'a\\x00b' is no path"),
        ({"tokenizer_dir": "a\ud800"}, r"^tokenizer_dir 'a\\ud800' is no path"),
        ({"tokenizer_dir": "x" * 5000}, r"^tokenizer_dir 'x+ cannot be read \(File name too long\); give"),
        ({"engine_dir": ""}, "^engine_dir '' is no path; give a folder's$"),
        ({"engine_dir": Path("a\0b")}, r"^engine_dir PosixPath\('a\\x00b'\) is no path"),
        ({"engine_dir": b"x"}, "^engine_dir b'x' is no path"),
        ({"kv_cache_free_gpu_mem_fraction": 0.001}, "0.001 is out of range; use 0.01 to 1.0$"),
    ],
)
def test_an_engine_is_opened_with_what_can_be_used(llm, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        LLM(**{"engine_dir": llm.engine.folder, **given})
    assert "\n" not in str(error.value)


def test_an_array_is_no_temperature():
    with pytest.raises(ConfigError, match=r"^temperature array\(\[1., 2.\]\) is no number"):
        SamplingConfig(temperature=np.array([1.0, 2.0]))


def test_a_request_that_fails_leaves_the_others_their_results(llm, monkeypatch):
    """With a KV cache that holds one sequence of the engine's limits, and not two beams of them."""
    scripts.leave_blocks(3, llm.engine, monkeypatch)
    tight = LLM(llm.engine.folder, device="cpu")
    long, beams = prompts()[3], replace(GREEDY, num_beams=2)
    before, failed, after = tight.generate([prompts()[1], long, prompts()[2]], [GREEDY, beams, GREEDY], 24)
    assert [before.ids, after.ids] == continuations()[1:3] and before.error is after.error is None
    assert (failed.prompt_ids, failed.ids, failed.text, failed.finish_reason) == (long, [], None, "error")
    assert re.match(r"the request needs up to 6 blocks of 64 tokens and the KV cache has 3; ask for ", failed.error)
    assert before.checked() is before
    with pytest.raises(UnsupportedError, match=re.escape(failed.error)):
        failed.checked()
    with pytest.raises(UnsupportedError, match=re.escape(failed.error)):
        list(tight.stream(long, beams, 24))
    with pytest.raises(UnsupportedError, match="the request needs up to"):
        tight.chat([{"role": "user", "content": "hi " * 50}], beams, 24)


def test_an_engine_of_two_ranks_needs_two(tmp_path):
    folder: Path = scripts.built(tmp_path / "engine", VERSION, 2)
    with pytest.raises(BaichuanError, match="was built for 2 rank"):
        LLM(folder)
