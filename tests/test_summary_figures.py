"""What an evaluation asks and counts: its prompts, its batches, and figures that equal PyTorch's."""

from __future__ import annotations

import math
import time

import goldens
import pytest
import torch
from bigram_side import BigramSide, evaluation_of
from evaluations import GREEDY, SHORT, rouge
from goldens import both_goldens
from torch.nn import functional as F

from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.request import Request
from baichuan.evaluation.scoring import agreement_of, common_prefix, negative_log_likelihood
from baichuan.evaluation.tasks import make_task, prompt_text
from baichuan.text.tokenizer import Tokenizer


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


def test_batches_and_the_limit_on_their_number():
    evaluation = evaluation_of([], SHORT, Request(GREEDY, 2, 2, 5, 9), None, scoring=False)
    assert [[task.sample.id for task in batch] for batch in evaluation.batches()] == [["0", "1"], ["2", "3"]]
