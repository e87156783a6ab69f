"""ROUGE: equal to rouge_score called directly and to values computed by hand; intervals as SciPy's bootstrap."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from baichuan.errors import ConfigError
from baichuan.evaluation import rouge
from baichuan.evaluation.rouge import KINDS, Rouge, interval
from baichuan.evaluation.rouge_metric import KINDS as METRIC_KINDS
from baichuan.evaluation.rouge_metric import WordsAndCharacters

RougeScorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer
EXACT = 1e-9  # the same sums in the same order: nothing but the factor 100 rounds


@pytest.fixture(scope="module")
def metric() -> Rouge:
    return Rouge()


def random_text(generator: random.Random) -> str:
    words = ["The", "cat's", "sat", "on", "a", "mat,", "naïve", "42", "U.S.", "running", "runs", "-", "end."]
    lines = [generator.choices(words, k=generator.randint(0, 9)) for _ in range(generator.randint(1, 4))]
    return "\n".join(" ".join(line) for line in lines)


def random_pairs(count: int) -> list[tuple[str, str]]:
    generator = random.Random(5)
    return [(random_text(generator), random_text(generator)) for _ in range(count)]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", "/dev/null/modules")
    with pytest.raises(ConfigError, match="cannot write to /dev/null/modules .*; set HF_HOME to"):
        Rouge()


def test_equal_to_rouge_score_called_directly(metric):
    pairs = random_pairs(50)
    scores = metric.score([p for p, _ in pairs], [r for _, r in pairs])
    direct = RougeScorer(list(KINDS))
    stemmed = RougeScorer(list(KINDS), use_stemmer=True)
    for kind in KINDS:
        expected = [100 * direct.score(r, p)[kind].fmeasure for p, r in pairs]
        assert scores[kind] == pytest.approx(expected, abs=EXACT)
        other = [100 * stemmed.score(r, p)[kind].fmeasure for p, r in pairs]
        assert scores[kind] != pytest.approx(other, abs=EXACT)  # the pairs tell a stemmer apart
    assert len(set(scores["rougeL"])) > 20 and scores["rougeL"] != scores["rougeLsum"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 3 of 3 and 3 of 6 words; bigrams "the cat" of 2 and of 5; subsequence "the cat mat"
        (
            "the cat mat",
            "The cat sat on the mat.",
            {"rouge1": 200 / 3, "rouge2": 200 / 7, "rougeL": 200 / 3, "rougeLsum": 200 / 3},
        ),
        # every word, no bigram "c d"; the longest common run of "a b" and "c d" across the swapped lines is one line
        ("c d\na b", "a b\nc d", {"rouge1": 100.0, "rouge2": 200 / 3, "rougeL": 50.0, "rougeLsum": 100.0}),
        # by character: 3 of 4 and 3 of 5; 山峰 of 3 and of 4 pairs, 世界 too is not in the prediction
        ("最高山峰", "世界的山峰", {"rouge1": 400 / 9, "rouge2": 200 / 7, "rougeL": 400 / 9, "rougeLsum": 400 / 9}),
    ],
)
def test_equal_to_values_computed_by_hand(metric, prediction, reference, expected):
    scores = metric.score([prediction], [reference])
    assert {kind: values[0] for kind, values in scores.items()} == pytest.approx(expected, abs=EXACT)


def test_chinese_has_a_score_only_by_character(metric):
    text = "珠穆朗玛峰是世界最高的山峰。"
    assert metric.score([text], [text])["rouge2"] == [100.0]
    assert RougeScorer(["rouge1"]).score(text, text)["rouge1"].fmeasure == 0
    assert WordsAndCharacters().tokenize("GPU加速，2.5倍 𠮷") == ["gpu", "加", "速", "2", "5", "倍", "𠮷"]


def test_empty_summaries_score_zero(metric):
    scores = metric.score(["", "x"], ["a b", ""])
    assert all(values == [0, 0] for values in scores.values())


@pytest.mark.parametrize(("path", "expected"), [("rouge.METRIC_PATH", (0, "[50.0]")), ("'rouge'", (7, ""))])
def test_the_metric_is_loaded_without_any_connection(tmp_path, path, expected):
    """In a process of its own that ends when it looks for a host, as it does for the hub's metric."""
    code = (
        "import sys, os\n"
        "hosts = ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname')\n"
        "sys.addaudithook(lambda event, args: event in hosts and os._exit(7))\n"
        "from baichuan.evaluation import rouge\n"
        f"rouge.METRIC_PATH = {path}\n"
        "print(rouge.Rouge().score(['a b'], ['a c'])['rouge1'])\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == expected, run.stderr


def test_the_metric_module_and_this_package_name_the_same_kinds():
    assert METRIC_KINDS == KINDS and set(rouge.LABELS) == set(KINDS)


def test_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2.0, 10.0, size=80)
    ours = interval(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean(), abs=EXACT)
    # A 2.5 % quantile of 2000 draws has a standard error of about 2 % of the interval's width.
    assert abs(ours.low - theirs.low) < 0.08 * width and abs(ours.high - theirs.high) < 0.08 * width
    assert abs(interval(values[:40]).low - theirs.low) > 0.08 * width  # half the sample is told apart


def test_interval_is_seeded_and_takes_blocks(monkeypatch):
    values = [1.0, 5.0, 2.0, 9.0, 4.0]
    first = interval(values)
    assert interval(values) == first != interval(values, seed=1)
    monkeypatch.setattr(rouge, "BLOCK_ELEMENTS", 5)
    assert interval(values) == first
    assert interval([3.0]) == rouge.Interval(3.0, 3.0, 3.0)
