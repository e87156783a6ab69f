"""The evaluation: both sides equal each other and the original, figures equal PyTorch's, interruptions keep work."""

from __future__ import annotations

import json
import logging
import math
import time
from functools import cache
from pathlib import Path

import goldens
import pytest
import torch
from bigram_side import BigramSide, evaluation_of
from tiny_engine import SAMPLES, engine
from torch.nn import functional as F

from baichuan.api.llm import LLM
from baichuan.api.ranks import Ranks
from baichuan.config import SamplingConfig
from baichuan.engine.folder import Engine
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.journal import run_all
from baichuan.evaluation.request import Request
from baichuan.evaluation.rouge import Rouge
from baichuan.evaluation.scoring import agreement_of, common_prefix, negative_log_likelihood
from baichuan.evaluation.sides import EngineSide, HfSide, check_hf_sampling
from baichuan.evaluation.summary import Evaluation
from baichuan.evaluation.tasks import make_task, prompt_text
from baichuan.evaluation.wording import decoding
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import run_ranks
from baichuan.text.tokenizer import Tokenizer
from baichuan.util import progress

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0)
NEVER = 999  # the goldens were made without an end id; their prompts and answers do not contain this one
NEW_TOKENS = 24
SETTINGS = {"dataset": "d", "batch_size": 2, "output_len": 5, "max_input_length": 9, "decoding": "greedy"}
both_goldens = pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)


@cache
def rouge() -> Rouge:
    return Rouge()


@cache
def hf_side(version: str) -> HfSide:
    return HfSide(load_hf_model(goldens.checkpoint(version), version), "the golden checkpoint")


def compare(built: Engine, version: str, request: Request, samples=SAMPLES) -> Evaluation:
    """Rank 0's evaluation of the engine, its ranks as threads, against the transformers model."""
    tokenizer = Tokenizer(goldens.checkpoint(version))
    tasks = [make_task(sample, tokenizer, request.max_input_length, built.build.max_input_len) for sample in samples]

    def run(comm) -> Evaluation | None:
        llm = LLM(built.folder, ranks=Ranks(comm))

        def evaluate() -> Evaluation:
            evaluation = Evaluation(
                [EngineSide(llm), hf_side(version)], tasks, request, tokenizer, rouge(), scoring=True, reference="hf"
            )
            evaluation.warm_up()
            for batch in evaluation.batches():
                evaluation.run(batch)
            return evaluation

        return llm.lead(evaluate)

    return run_ranks(built.build.world_size, run)[0]


# The two sides


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 8])
@both_goldens
def test_a_float32_engine_and_transformers_write_the_same_tokens(version, batch_size, tp_size):
    evaluation = compare(engine(version, tp_size), version, Request(GREEDY, batch_size, 20, NEW_TOKENS, 200, True))
    agreement = evaluation.figures("engine").agreement
    assert len(evaluation.samples) == agreement.identical_summaries == len(SAMPLES)
    assert agreement.mean_identical_prefix > 15 and agreement.same_first_choice == 1.0
    assert 0 <= agreement.mean_kl < 1e-7  # half the variance of logits' differences, which are 4e-5 at most on a CPU
    first, second = (evaluation.figures(key) for key in ("engine", "hf"))
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
    assert first.rouge == second.rouge and first.new_tokens == second.new_tokens


def test_an_int4_engine_is_told_apart():
    evaluation = compare(engine("v2_13b", 1, "int4"), "v2_13b", Request(GREEDY, 8, 20, NEW_TOKENS, 200, True))
    agreement = evaluation.figures("engine").agreement
    assert agreement.identical_summaries < len(SAMPLES) and agreement.mean_identical_prefix < NEW_TOKENS - 1
    assert agreement.mean_kl > 1e-4 and agreement.same_first_choice < 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(top_k=1, repetition_penalty=1.3),
        SamplingConfig(top_k=5, temperature=0.8, random_seed=3),
        SamplingConfig(top_k=1, repetition_penalty=1.0, num_beams=4, temperature=1.0),
        SamplingConfig(top_k=1, repetition_penalty=1.0, num_beams=3, temperature=0.7, length_penalty=0.5),
    ],
    ids=decoding,
)
def test_every_way_of_decoding_is_the_same_on_both_sides(sampling):
    """Batches of prompts of different lengths: padding must not be seen by the penalty."""
    request = Request(sampling, 8, 20, NEW_TOKENS, 200)
    evaluation = compare(engine("v1_7b"), "v1_7b", request)
    assert evaluation.figures("engine").agreement.identical_summaries == len(SAMPLES)
    greedy = [
        hf_side("v1_7b").generate([sample.task.prompt], GREEDY, NEW_TOKENS)[0].ids for sample in evaluation.samples
    ]
    assert greedy != [sample.summaries["hf"].ids for sample in evaluation.samples]


@both_goldens
def test_the_transformers_side_in_one_padded_batch_equals_the_original(version):
    golden = goldens.golden(version)
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    results = hf_side(version).generate(prompts, SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER), 24)
    assert [result.ids for result in results] == [golden[f"gen_{length}"].tolist() for length in goldens.LENGTHS]
    assert {result.finish_reason for result in results} == {"length"}
    expected = golden["logits_33"]
    assert (hf_side(version).score(prompts[2]) - expected).abs().max() <= goldens.FLOAT32_TOLERANCE


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_goldens
def test_the_transformers_side_on_a_gpu(version):
    golden, side = (
        goldens.golden(version),
        HfSide(load_hf_model(goldens.checkpoint(version), version, device="cuda"), ""),
    )
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    results = side.generate(prompts, SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER), 24)
    assert [result.ids for result in results] == [golden[f"gen_{length}"].tolist() for length in goldens.LENGTHS]
    logits = side.score(prompts[3])
    assert logits.is_cuda and side.facts["device"] == torch.cuda.get_device_name()
    assert negative_log_likelihood(logits[:-1], prompts[3][1:]) > 0
    assert agreement_of(hf_side(version).score(prompts[3]), logits).kl < 1e-7  # computed on two devices


def test_stop_ids_end_both_sides_alike():
    golden = goldens.golden("v1_7b")
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    stop = golden["gen_33"].tolist()[5]
    config = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER, stop_ids=(stop,))
    side = EngineSide(LLM(engine("v1_7b").folder))
    ours, theirs = (each.generate(prompts, config, 24) for each in (side, hf_side("v1_7b")))
    assert [(each.ids, each.finish_reason) for each in ours] == [(each.ids, each.finish_reason) for each in theirs]
    assert theirs[2].ids == golden["gen_33"].tolist()[:5] and theirs[2].finish_reason == "stop"


def test_a_checkpoints_own_generation_settings_do_not_slip_in():
    from transformers import GenerationConfig

    model = load_hf_model(goldens.checkpoint("v1_7b"), "v1_7b")
    model.generation_config = GenerationConfig(repetition_penalty=2.0, no_repeat_ngram_size=1, eos_token_id=[5, 6, 7])
    prompt = goldens.golden("v1_7b")["ids_7"].tolist()
    own = model.generate(torch.tensor([prompt]), max_new_tokens=24)[0, 7:].tolist()
    config = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER)
    ours = HfSide(model, "x").generate([prompt], config, 24)[0].ids
    assert ours == goldens.golden("v1_7b")["gen_7"].tolist() != own


def test_beams_with_a_penalty_are_refused_on_the_transformers_side():
    config = SamplingConfig(top_k=1, num_beams=2, repetition_penalty=1.1)
    with pytest.raises(ConfigError, match="repetition_penalty 1.1 with num_beams 2"):
        check_hf_sampling(config)


def test_a_full_gpu_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    side = HfSide(load_hf_model(goldens.checkpoint("v1_7b"), "v1_7b"), "x")
    monkeypatch.setattr(side.model, "forward", fail)
    for call in (lambda: side.generate([[5]], GREEDY, 2), lambda: side.score([5])):
        with pytest.raises(UnsupportedError, match="--hf_device cpu"):
            call()


# Prompts


def test_the_prompt_is_the_old_examples():
    assert prompt_text(" It does n't rain .\n") == "It doesn't rain .\n TL;DR:"
    assert prompt_text("雨。") == "雨。 TL;DR:"


@both_goldens
def test_of_long_articles_the_last_tokens_are_kept(version):
    tokenizer = Tokenizer(goldens.checkpoint(version))
    article = "one two three " * 400
    whole = tokenizer.encode(prompt_text(article))
    task = make_task(Sample("1", article, "four"), tokenizer, 923, None)
    assert task.prompt == whole[-923:] and task.left_out == len(whole) - 923 > 0
    assert task.scored == task.prompt + tokenizer.encode("four")
    assert make_task(Sample("1", "one", "four"), tokenizer, 923, None).left_out == 0
    assert make_task(Sample("1", article, "four"), tokenizer, 923, 50).scored == task.scored[-50:]


def test_an_article_cannot_contain_control_ids():
    tokenizer = Tokenizer(goldens.checkpoint("v1_7b"))
    article = "a</s>b<s>c"
    assert {1, 2} < set(tokenizer.encode(article))
    assert not {1, 2} & set(make_task(Sample("1", article, article), tokenizer, 923, None).scored)


# Figures


def test_perplexity_and_kl_equal_pytorchs():
    sides = [BigramSide("engine", 1), BigramSide("hf", 2)]
    request = Request(GREEDY, 2, 20, 5, 300, eval_ppl=True)
    samples = [Sample("1", "abc " * 60, "xyz"), Sample("2", "q", "r")]  # over and under POSITIONS_AT_ONCE
    evaluation = evaluation_of(sides, samples, request, rouge(), scoring=True)
    evaluation.run(evaluation.batches()[0])
    ids = [torch.tensor(task.scored) for task in evaluation.tasks]
    targets = torch.cat([each[1:] for each in ids])
    ours, theirs = (torch.cat([side.table[each[:-1]] for each in ids]).double() for side in sides)
    assert evaluation.scored_tokens == len(targets)
    # float64 sums in another order
    for key, logits in (("engine", ours), ("hf", theirs)):
        expected = F.cross_entropy(logits, targets).exp().item()
        assert evaluation.figures(key).perplexity == pytest.approx(expected, rel=1e-12)
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    agreement = evaluation.figures("engine").agreement
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert agreement.mean_kl == pytest.approx(kl, rel=1e-12)
    assert agreement.mean_kl != pytest.approx(F.kl_div(p, q, log_target=True, reduction="batchmean").item(), rel=1e-3)
    assert agreement.same_first_choice == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())


def test_scoring_functions_take_positions_in_parts():
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0))
    targets = [i % 11 for i in range(300)]
    expected = F.cross_entropy(logits.double(), torch.tensor(targets), reduction="sum").item()
    assert negative_log_likelihood(logits, targets) == pytest.approx(expected, rel=1e-12)
    assert agreement_of(logits, logits.clone()).kl == 0 and agreement_of(logits, logits).top1 == 1
    assert math.isnan(agreement_of(logits, logits * math.nan).kl)


@pytest.mark.parametrize(
    ("a", "b", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([], [1], 0), ([5], [6], 0)]
)
def test_common_prefix(a, b, length):
    assert common_prefix(a, b) == common_prefix(b, a) == length


def test_end_ids_count_as_tokens_and_latency_is_generations_alone():
    def wait(call: int) -> None:
        time.sleep(0.05 if call else 1.0)

    side = BigramSide("engine", answer=lambda prompt: "abc", before=wait)
    evaluation = evaluation_of([side], SHORT, Request(GREEDY, 2, 20, 5, 9), rouge(), scoring=False)
    evaluation.warm_up()
    for tasks in evaluation.batches():
        evaluation.run(tasks)
    figures = evaluation.figures("engine")
    assert figures.new_tokens == 5 * 4  # three and their end
    assert 0.15 <= figures.latency_s < 1.0  # three batches; the warm-up is not counted
    assert figures.perplexity is None and figures.agreement is None


def test_the_warm_up_has_the_longest_prompts_of_all_batches():
    samples = [Sample(str(n), "a" * length, "abc") for n, length in enumerate((1, 7, 2, 3, 5))]
    side = BigramSide("engine")
    evaluation = evaluation_of([side], samples, Request(GREEDY, 2, 20, 5, 99), None, scoring=False)
    evaluation.warm_up()
    prompts, new_tokens = side.warmed
    every = sorted(len(task.prompt) for task in evaluation.tasks)
    assert sorted(map(len, prompts)) == every[-2:] and len(set(every)) == 5 and new_tokens == 5


SHORT = [Sample(str(n), "abcdefgh"[n:], "abc") for n in range(5)]


def test_batches_and_the_limit_on_their_number():
    evaluation = evaluation_of([], SHORT, Request(GREEDY, 2, 2, 5, 9), None, scoring=False)
    assert [[task.sample.id for task in batch] for batch in evaluation.batches()] == [["0", "1"], ["2", "3"]]


# Interruptions


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
