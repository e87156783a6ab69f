"""Flags and settings that would change nothing are refused where they alone say so, else told of in the log."""

from __future__ import annotations

import json

import goldens
import pytest
import scripts

import run
import summarize

VERSION = "v1_7b"
CHECKPOINT = str(goldens.checkpoint(VERSION))
BEAMS = ["--num_beams", "2"]
BEAMS_AND_PENALTY = [*BEAMS, "--length_penalty", "2"]
FRACTION = "kv_cache_free_gpu_mem_fraction"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return scripts.built(tmp_path_factory.mktemp("engine") / "engine", VERSION)


# A file's lines


@pytest.mark.parametrize(
    ("given", "line", "sentence"),
    [
        ([], {"num_beams": 2, "top_k": 3}, "num_beams 2 searches and does not sample; leave top_k out"),
        ([], {"num_beams": 2, "random_seed": 3}, "num_beams 2 searches and does not sample; leave random_seed out"),
        (BEAMS, {"top_p": 0.5}, "num_beams 2 searches and does not sample; leave top_p out"),
        ([], {"length_penalty": 2.0}, "length_penalty 2.0 belongs to beam search; give num_beams above 1"),
        (BEAMS, {"num_beams": 1, "length_penalty": 2}, "length_penalty 2 belongs to beam search; give num_beams above"),
    ],
)
def test_a_line_s_setting_without_effect_is_refused_with_its_number(engine, tmp_path, capsys, given, line, sentence):
    rows = [{"prompt": "a"}, {"prompt": "a", **line}]
    flags = prompt_file(engine, tmp_path, rows, *given)
    scripts.refused(run.main, flags, f"prompts.jsonl line 2: {sentence}", capsys)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--top_k", "1", "--random_seed", "3"], BEAMS),
        (BEAMS_AND_PENALTY, ["--num_beams", "1"]),
        (BEAMS_AND_PENALTY, ["--num_beams", "1", "--top_k", "3"]),
        (BEAMS, ["--length_penalty", "2"]),
    ],
)
def test_what_a_line_inherits_is_not_held_against_it(engine, tmp_path, given, line):
    """The flags are for the other lines."""
    settings = {name[2:]: int(value) for name, value in zip(line[::2], line[1::2], strict=True)}
    assert run.main(prompt_file(engine, tmp_path, [{"prompt": "a"}, {"prompt": "a", **settings}], *given)) == 0


def prompt_file(engine, folder, rows, *more) -> list[str]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--prompt_file", str(path), "--output_jsonl", str(folder / "out.jsonl")]
    return ["--engine_dir", str(engine), *files, "--max_output_len", "1", *more]


# summarize.py


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("0.015", f"{FRACTION} 0.015 is divided among 2 models, each of which takes at least 0.01; give 0.02 or more"),
        ("1.5", f"{FRACTION} 1.5 is out of range; use 0.01 to 1.0"),
        ("0.001", f"{FRACTION} 0.001 is out of range; use 0.01 to 1.0"),
    ],
)
def test_a_share_of_the_memory_is_refused_as_it_was_given(engine, capsys, value, sentence):
    sides = ["--test_trt_llm", "--engine_dir", str(engine), "--test_hf", "--hf_model_dir", CHECKPOINT]
    scripts.refused(summarize.main, [*sides, f"--{FRACTION}", value], sentence, capsys)
