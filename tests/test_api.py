"""The Python interface: goldens through it, its page's examples, and calls that run beside each other."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import goldens
import numpy as np
import pytest
import scripts
import torch
from api_goldens import GREEDY, VERSION, continuations, prompts
from demo_checkpoint import demo_checkpoint

import build
from baichuan import LLM, SamplingConfig
from baichuan.api import llm as llm_module
from baichuan.api.ranks import Ranks
from baichuan.api.traffic import Traffic
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.parallel.comm import run_ranks
from baichuan.text.chat import build_chat_prompt

PAGE = (scripts.ROOT / "docs/api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    return LLM(scripts.built(tmp_path_factory.mktemp("engine"), VERSION))


def test_the_cache_is_sized_and_shared_as_asked(llm):
    other = LLM(llm.engine.folder, kv_cache_free_gpu_mem_fraction=0.5, prefix_caching=False)
    results = other.generate(prompts() * 2, GREEDY, 24)
    assert [result.ids for result in results] == continuations() * 2
    with pytest.raises(ConfigError, match="kv_cache_free_gpu_mem_fraction 0 is out of range"):
        LLM(llm.engine.folder, kv_cache_free_gpu_mem_fraction=0)


def test_the_goldens_more_prompts_than_rows(llm):
    results = llm.generate(prompts() * 5, GREEDY, 24, keep_logits=True)
    assert len(results) == 20 > 4 * llm.engine.build.max_batch_size
    for result, length, expected in zip(results, goldens.LENGTHS * 5, continuations() * 5, strict=True):
        assert (result.ids, result.finish_reason) == (expected, "length")
        wanted = goldens.golden(VERSION)[f"gen_logits_{length}"]
        torch.testing.assert_close(result.logits, wanted, rtol=0, atol=goldens.FLOAT32_TOLERANCE)
        assert result.text == llm.tokenizer.decode(result.ids)


def test_every_prompt_keeps_its_own_settings_whoever_runs_beside_it(llm):
    drawn = [replace(GREEDY, top_k=0, temperature=2.0, random_seed=seed) for seed in (3, 4)]
    ends = replace(GREEDY, stop_ids=(continuations()[1][5],))
    beams = replace(GREEDY, num_beams=2)
    settings = [*drawn, beams, ends, GREEDY]
    [prompt] = prompts()[1:2]
    together = llm.generate([prompt] * 5, settings, 12)
    alone = [llm.generate(prompt, each, 12)[0] for each in settings]
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert together[0].ids != together[1].ids, "another seed, other draws"
    assert together[3].finish_reason == "stop" and len(together[3].ids) <= 5
    numbered = llm.generate([prompt] * 2, replace(drawn[0]), 12)
    assert [each.ids for each in numbered] == [each.ids for each in together[:2]], "seeds count up"


ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_threads_share_an_engine(llm, device):
    """Each call gets what it would get alone, wherever Python changes threads."""
    shared = LLM(llm.engine.folder, device=device)
    shared.load()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda prompt: shared.generate([prompt], GREEDY, 24)[0].ids, prompts() * 4))
    finally:
        sys.setswitchinterval(before)
    assert results == continuations() * 4


def test_threads_load_an_engine_once(llm, monkeypatch):
    opened, count = llm_module.open_serving, []

    def slow(*args):
        count.append(args)
        time.sleep(0.2)
        return opened(*args)

    monkeypatch.setattr(llm_module, "open_serving", slow)
    fresh = LLM(llm.engine.folder)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fresh.load(), range(2))
    assert first is second and len(count) == 1


def test_ids_come_as_arrays_and_tensors_too(llm):
    ids = prompts()[1]
    kinds = [ids, [ids], np.array(ids), np.array([ids]), torch.tensor(ids), [torch.tensor(ids)], tuple(ids)]
    kinds += [
        [np.int64(each) for each in ids],
        [[np.int32(each) for each in ids]],
        [torch.tensor(each) for each in ids],
    ]
    for given in kinds:
        assert llm.generate(given, GREEDY, 24)[0].ids == continuations()[1]
    assert [each.prompt_ids for each in llm.generate([torch.tensor([5]), [6]], GREEDY, 1)] == [[5], [6]]


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint64])
def test_settings_come_as_numpys_numbers_too(llm, kind):
    """Whatever kind of number each field is given as, and with several prompts, whose seeds count up."""
    whole = {"num_beams": 1, "top_k": 7, "random_seed": 5, "eos_id": 2, "pad_id": 3}
    real = {"top_p": 0.75, "temperature": 0.5, "repetition_penalty": 1.25, "length_penalty": 1.5}  # float16 has these
    plain = SamplingConfig(**whole, **real, stop_ids=(9, 11))
    reals = {name: np.float16(value) for name, value in real.items()}
    given = SamplingConfig(
        **{name: kind(value) for name, value in whole.items()}, **reals, stop_ids=[kind(each) for each in (9, 11)]
    )
    assert given == plain and repr(given) == repr(plain)
    expected = llm.generate(prompts()[:2], plain, 6)
    assert [each.ids for each in llm.generate(prompts()[:2], given, kind(6))] == [each.ids for each in expected]
    streamed = [token for piece in llm.stream(prompts()[0], given, kind(6)) for token in piece.ids]
    assert streamed == expected[0].ids
    beams = replace(GREEDY, num_beams=kind(2))
    assert llm.generate(prompts()[1], beams, kind(6))[0].ids == llm.generate(prompts()[1], replace(beams), 6)[0].ids


def test_where_the_model_ends_a_text_its_end_id_has_a_row_of_logits(llm):
    ends = replace(GREEDY, eos_id=continuations()[1][5])
    [ended] = llm.generate(prompts()[1], ends, 24, keep_logits=True)
    assert ended.finish_reason == "stop" and len(ended.logits) == len(ended.ids) + 1


def test_one_stop_text_is_a_list_of_one(llm):
    text = llm.generate(prompts()[1], GREEDY, 24)[0].text
    stop = text[9] + text[2]
    assert stop not in text
    assert llm.generate(prompts()[1], GREEDY, 24, stop_texts=stop)[0].text == text
    assert llm.generate(prompts()[1], GREEDY, 24, stop_texts=text[9:12])[0].text == text[: text.index(text[9:12])]


def test_streams_run_beside_each_other_and_a_closed_one_ends(llm):
    first, second = (llm.stream(prompt, GREEDY, 24) for prompt in prompts()[1:3])
    begun = next(first)
    whole = list(second)
    assert [token for piece in whole for token in piece.ids] == continuations()[2]
    assert "".join(piece.text for piece in whole) == llm.tokenizer.decode(continuations()[2])
    assert [piece.finish_reason for piece in whole[-2:]] == [None, "length"]
    rest = list(first)
    assert [token for piece in [begun, *rest] for token in piece.ids] == continuations()[1]
    left = llm.stream(prompts()[1], GREEDY, 24)
    next(left)
    left.close()
    llm.generate(prompts()[0], GREEDY, 2)
    assert llm.load()[0].unfinished == 0


def test_a_stream_stops_between_two_steps(llm):
    heard: list[int] = []
    for piece in llm.stream(prompts()[1], GREEDY, 24, stopped=lambda: len(heard) >= 3):
        heard.extend(piece.ids)
    assert piece.finish_reason == "cancelled" and 3 <= len(heard) < 6
    assert heard == continuations()[1][: len(heard)]


def test_what_waits_is_cancelled_too(llm):
    traffic, steps = Traffic(llm.load()[0], room=2), []
    requests = llm.requests(prompts(), GREEDY, 24)
    heard = list(traffic.progress(requests, stopped=lambda: bool(steps.append(None)) or len(steps) > 3))
    ended = {progress.key: progress.finish_reason for progress in heard if progress.finished}
    assert ended == {request.key: "cancelled" for request in requests} and llm.load()[0].unfinished == 0
    assert {progress.key for progress in heard if progress.new_ids} == {request.key for request in requests[:2]}


@pytest.mark.parametrize("length", goldens.LENGTHS[1:])
def test_scores_are_the_original_codes(llm, length):
    ids = goldens.golden(VERSION)[f"ids_{length}"]
    logits = goldens.golden(VERSION)[f"logits_{length}"]
    [score] = llm.score([ids.tolist()])
    expected = logits[:-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    # A logit that moves by t moves a log-probability by at most 2 t.
    torch.testing.assert_close(torch.tensor(score.log_probs), expected.float(), rtol=0, atol=2e-4)
    assert score.likeliest == (logits[:-1].argmax(-1) == ids[1:]).tolist()
    [other] = llm.score([[*ids.tolist()[:-1], (ids[-1].item() + 1) % 1000]])
    assert abs(other.log_likelihood - score.log_likelihood) > 2e-3, "negative control: another last token"


def test_a_chat_is_the_released_prompt(tmp_path):
    llm = LLM(scripts.built(tmp_path / "engine", "v2_13b"))
    messages = [{"role": "user", "content": "你好"}]
    answer = llm.chat(messages, GREEDY, 6)
    assert answer.prompt_ids == build_chat_prompt(llm.tokenizer, messages, *llm.roles)
    assert answer.ids == llm.generate([answer.prompt_ids], replace(GREEDY, stop_ids=tuple(llm.roles)), 6)[0].ids


def test_stop_texts_end_a_text_where_they_first_occur(llm):
    [whole] = llm.generate(prompts()[2], GREEDY, 24)
    stop = whole.text[len(whole.text) // 2 :][:2]
    [ended, not_ended] = llm.generate([prompts()[2]] * 2, GREEDY, 24, stop_texts=["never so", stop])
    assert ended.text == not_ended.text == whole.text[: whole.text.index(stop)] != whole.text
    assert ended.finish_reason == "stop" and len(ended.ids) < 24
    [other] = llm.generate(prompts()[2], GREEDY, 24, stop_texts=["never so"])
    assert (other.text, other.finish_reason) == (whole.text, "length")
    [kept] = llm.generate(prompts()[2], GREEDY, 24, stop_texts=[stop], keep_logits=True)
    assert (kept.text, kept.finish_reason, len(kept.logits)) == (ended.text, "stop", len(kept.ids))


def test_two_ranks_do_what_the_first_is_told(tmp_path):
    folder = scripts.built(tmp_path / "engine", VERSION, 2)

    def on_rank(comm):
        llm = LLM(folder, device="cpu", ranks=Ranks(comm))
        return llm.lead(lambda: [llm.generate(prompts(), GREEDY, 24), list(llm.stream(prompts()[0], GREEDY, 3))])

    led, followed = run_ranks(2, on_rank)
    assert followed is None and [each.ids for each in led[0]] == continuations()
    assert [token for piece in led[1] for token in piece.ids] == continuations()[0][:3]


def test_an_error_of_the_first_rank_is_raised_on_all(tmp_path):
    folder = scripts.built(tmp_path / "engine", VERSION, 2)

    def on_rank(comm):
        llm = LLM(folder, device="cpu", ranks=Ranks(comm))
        with pytest.raises(ConfigError, match="^the prompt is empty"):
            llm.lead(lambda: llm.generate([[]], GREEDY, 1))
        return True

    assert run_ranks(2, on_rank) == [True, True]


def test_no_rank_waits_for_one_that_ended_by_a_mistake_of_the_users():
    def on_rank(comm):
        with pytest.raises(UnsupportedError if comm.rank else ZeroDivisionError, match="division or modulo by zero"):
            Ranks(comm).lead(lambda: 1 // 0)
        return True

    assert run_ranks(2, on_rank, timeout_s=60) == [True, True]


def test_the_pages_examples_run(tmp_path, capsys):
    folder = tmp_path / "engine"
    given = ["--model_dir", str(demo_checkpoint("v2_7b", 3)), "--output_dir", str(folder), "--no_self_check"]
    assert build.main([*given, "--dtype", "float32", "--log_level", "error"]) == 0
    assert len(EXAMPLES) == 7
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example.replace("./tmp/Baichuan2-7B-Chat/", str(folder)), "docs/api.md", "exec"), names)
    assert len(names["first"].ids) == len(names["second"].ids) == 8 and names["score"].log_likelihood < 0
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_package_alone_imports_nothing_else():
    program = "import sys, baichuan; print('torch' in sys.modules); from baichuan import LLM; print(LLM.__module__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=scripts.ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "baichuan.api.llm"], done.stderr
    with pytest.raises(ImportError):
        from baichuan import Nothing  # noqa: F401
