"""summarize.py --eval_ppl on a text file: the figures against float64 in NumPy, and what is refused."""

from __future__ import annotations

import json
import re

import goldens
import numpy as np
import pytest
import scripts
import torch
from tiny_engine import SAMPLES, engine

import summarize
from baichuan.errors import ConfigError
from baichuan.evaluation.perplexity import read_windows
from baichuan.hf_model.modeling import load_hf_model
from baichuan.text.tokenizer import Tokenizer

VERSION, WINDOW = "v2_13b", 24
TEXT = "\n".join(sample.article for sample in SAMPLES)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def flags(text, *more):
    sides = ["--test_trt_llm", "--engine_dir", str(engine(VERSION).folder)]
    return [*sides, "--eval_ppl", "--dataset_path", str(text), "--max_input_length", str(WINDOW), *more]


def expected(most):
    """Perplexity of the first windows by the float32 model, the rest in float64."""
    ids, nll, count = Tokenizer(goldens.checkpoint(VERSION)).encode_literal(TEXT), 0.0, 0
    model = load_hf_model(goldens.checkpoint(VERSION), VERSION)
    for start in range(0, len(ids), WINDOW)[:most]:
        window = ids[start : start + WINDOW]
        with torch.inference_mode():
            logits = model(torch.tensor([window])).logits[0].double().numpy()
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll -= sum(logs[place, token] for place, token in enumerate(window[1:]))
        count += len(window) - 1
    return np.exp(nll / count), count


@pytest.mark.parametrize("most", [3, 1000])
def test_the_perplexity_is_that_of_the_windows(text, most, tmp_path, capsys):
    given = ["--test_hf", "--hf_model_dir", str(goldens.checkpoint(VERSION)), "--data_type", "fp32"]
    assert summarize.main(flags(text, *given, "--max_ite", str(most), "--output_dir", str(tmp_path))) == 0
    out = capsys.readouterr().out
    value, tokens = expected(most)
    values = json.loads((tmp_path / "perplexity.json").read_text())
    assert values["scored_tokens"] == tokens and [side["key"] for side in values["sides"]] == ["engine", "hf"]
    for side in values["sides"]:
        assert side["perplexity"] == pytest.approx(value, rel=1e-5)  # float32 logits, of which each differs by 1e-5
    assert 0 <= values["sides"][0]["mean_kl"] < 1e-8 and values["sides"][0]["same_first_choice"] == 1.0
    assert f"{tokens} tokens in {values['windows']} windows" in out and f"{value:.3f}"[:-1] in out
    assert bool(re.search(r"windows of \d+ \(--max_ite scores more\)", out)) == (most == 3)


def test_what_would_be_ignored_is_refused(text, capsys):
    for given, sentence in (
        (["--num_beams", "3"], "nothing is generated from"),
        (["--output_len", "5"], "leave --output_len out"),
        (["--check_accuracy"], "leave --check_accuracy out"),
    ):
        scripts.refused(summarize.main, flags(text, *given), sentence, capsys)
    without = [flag for flag in flags(text) if flag != "--eval_ppl"]
    scripts.refused(summarize.main, without, "add --eval_ppl to measure its perplexity", capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "fewer than two tokens"),
        (b"ab\xff", "UTF-8 at byte 2"),
        (b"a" * ((8 << 20) + 1), "larger than 8388608 bytes"),  # whose tokens would take gigabytes at no limit
    ],
)
def test_a_file_without_text_is_refused(content, message, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_windows(path, Tokenizer(goldens.checkpoint(VERSION)), 8, 10)


def test_a_window_of_one_token_is_refused(text):
    with pytest.raises(ConfigError, match="one token has no perplexity"):
        read_windows(text, Tokenizer(goldens.checkpoint(VERSION)), 1, 10)
