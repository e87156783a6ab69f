"""build.py and run.py as their users start them: the goldens end to end, and what run.py offers besides."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import goldens
import numpy as np
import pytest
import scripts
from tiny_engine import snapshot

import build
import run
import summarize
from baichuan.engine import runtime

VERSION = "v1_7b"


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {version: scripts.built(folder / version, version) for version in goldens.VERSIONS_WITH_GOLDENS}


@pytest.fixture(scope="module")
def engine(engines) -> Path:
    return engines[VERSION]


@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
@pytest.mark.parametrize("length", goldens.LENGTHS)
def test_goldens(engines, tmp_path, version, length):
    given = scripts.prompts_csv(tmp_path / "prompts.csv", version, (length,))
    assert run.main(scripts.run_flags(engines[version], given, tmp_path)) == 0
    scripts.check_outputs(tmp_path, version, (length,))


@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
def test_a_batch_of_all_lengths_equals_the_goldens_too(engines, tmp_path, version):
    ids = [goldens.golden(version)[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    padded = np.array([row + [0] * (128 - len(row)) for row in ids])
    np.save(tmp_path / "prompts.npy", padded)
    assert run.main(scripts.run_flags(engines[version], tmp_path / "prompts.npy", tmp_path)) == 0
    scripts.check_outputs(tmp_path, version)


def test_the_check_of_the_outputs_can_fail(engines, tmp_path):
    """Negative control: sampled, the continuation is another."""
    given = scripts.prompts_csv(tmp_path / "prompts.csv", "v2_13b", (7,))
    more = ["--top_k", "0", "--top_p", "0", "--temperature", "5"]
    assert run.main(scripts.run_flags(engines["v2_13b"], given, tmp_path, *more)) == 0
    with pytest.raises(AssertionError):
        scripts.check_outputs(tmp_path, "v2_13b", (7,))


def test_build_checks_itself_and_parallel_ranks_have_the_same_bytes(tmp_path, capsys):
    more = ["--world_size", "2"]
    assert build.main(scripts.build_flags(tmp_path / "one", VERSION, *more)) == 0
    assert "same first choice at 100.0 % of the positions" in capsys.readouterr().err
    assert build.main(scripts.build_flags(tmp_path / "two", VERSION, *more, "--parallel_build")) == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.mark.parametrize(("length", "warned"), [(4072, False), (4073, True)])
def test_longer_than_the_model_was_trained_for(tmp_path, capsys, length, warned):
    given = scripts.build_flags(tmp_path / "engine", VERSION, "--max_input_len", str(length), "--no_self_check")
    assert build.main(given) == 0
    sentence = "make sequences of up to 4097 tokens, and the model was trained for 4096"
    assert (sentence in capsys.readouterr().err) == warned


def test_streaming_prints_the_same_text(engine, capsys):
    outputs = []
    for more in ([], ["--streaming"]):
        assert run.main(scripts.text_flags(engine, VERSION, "--input_text", "The river 长江", *more)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith('Input: "') and 'Output: "' in outputs[0]


def test_no_weight_copies_reaches_the_executor(engine, tmp_path, monkeypatch):
    """On the CPU there is nothing to keep, so the request is looked at where it arrives."""
    asked, open_executor = [], runtime.open_executor
    monkeypatch.setattr(
        runtime, "open_executor", lambda *args: asked.append(args[2].keep_copies) or open_executor(*args)
    )
    article = tmp_path / "articles.jsonl"
    article.write_text('{"article": "Rain.", "highlights": "Rain."}\n')
    for more in ([], ["--no_weight_copies"]):
        assert run.main(scripts.text_flags(engine, VERSION, *more)) == 0
        flags = ["--test_trt_llm", "--engine_dir", str(engine), "--tokenizer_dir", str(goldens.checkpoint(VERSION))]
        flags += ["--dataset_path", str(article), "--output_len", "2", "--max_input_length", "8", *more]
        assert summarize.main(["--model_version", VERSION, *flags]) == 0
    assert asked == [True, True, False, False]


def likelihood(row: list[int], logits: np.ndarray, prompt_len: int) -> float:
    """Sum of the log probabilities of the row's new ids."""
    logits = logits.astype(np.float64)
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    new = row[prompt_len:]
    return float((logits[np.arange(len(new)), new] - normaliser[: len(new)]).sum())


def test_beams_find_a_text_at_least_as_likely_as_greedy(engine, prompts, tmp_path):
    found = {}
    for name, sampling in {"greedy": ["--top_k", "1"], "beams": ["--num_beams", "2"]}.items():
        out = tmp_path / name
        out.mkdir()
        files = ["--output_csv", str(out / "ids.csv"), "--output_logits_npy", str(out / "logits.npy")]
        given = ["--engine_dir", str(engine), "--input_tokens", str(prompts), "--repetition_penalty", "1", *files]
        assert run.main([*given, "--max_output_len", "6", *sampling]) == 0
        row = [int(cell) for cell in next(csv.reader((out / "ids.csv").open()))]
        assert len(row) == 7 + 6
        found[name] = likelihood(row, np.load(out / "logits.npy")[0], 7)
    assert found["beams"] >= found["greedy"] - 1e-4


def test_one_seed_one_text(engine, prompts, tmp_path):
    rows = []
    for seed in ("1", "1", "2"):
        more = ["--top_k", "50", "--top_p", "0", "--temperature", "2", "--random_seed", seed]
        assert run.main(scripts.run_flags(engine, prompts, tmp_path, *more)) == 0
        rows.append((tmp_path / "ids.csv").read_text())
    assert rows[0] == rows[1] != rows[2]


def test_a_locale_without_chinese_changes_no_file_and_no_text(engine, tmp_path):
    """PYTHONUTF8=0 makes ASCII the encoding of every file that is opened without naming one."""
    ascii_only = scripts.ENVIRONMENT | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = []
    for environment in (scripts.ENVIRONMENT, ascii_only):
        out = tmp_path / "ids.csv"
        command = scripts.script(
            "run.py", scripts.text_flags(engine, VERSION, "--output_csv", str(out), "--max_output_len", "4")
        )
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        found.append((done.stdout.decode(), out.read_text()))
    assert found[0] == found[1] and "世界上第二高的山峰是哪座？" in found[0][0]
