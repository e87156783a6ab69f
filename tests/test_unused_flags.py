"""Flags and settings that would change nothing are refused where they alone say so, else told of in the log."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import goldens
import pytest
import scripts

import run
import summarize
from baichuan.api.llm import LLM
from baichuan.api.unused_settings import say_unused_arguments
from baichuan.cli import memory_flags
from baichuan.cli.common import Parser
from baichuan.cli.run_flags import add_flags
from baichuan.cli.unused_flags import say_unused
from baichuan.config import QuantConfig, SamplingConfig
from baichuan.errors import ConfigError
from baichuan.executors import open_settings
from baichuan.executors.open_settings import OpenSettings
from baichuan.executors.registry import BACKENDS

VERSION = "v1_7b"
CHECKPOINT = str(goldens.checkpoint(VERSION))
BEAMS = ["--num_beams", "2"]
BEAMS_AND_PENALTY = [*BEAMS, "--length_penalty", "2"]
FRACTION = "kv_cache_free_gpu_mem_fraction"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return scripts.built(tmp_path_factory.mktemp("engine") / "engine", VERSION)


@pytest.fixture
def articles(tmp_path):
    path = tmp_path / "articles.jsonl"
    path.write_text(json.dumps({"article": "Rain fell.", "highlights": "Rain."}) + "\n")
    return path


def told(capsys) -> list[str]:
    """The lines of the log that are about flags without effect."""
    marks = ("changes nothing", " is for --")
    return [line for line in capsys.readouterr().err.splitlines() if any(mark in line for mark in marks)]


def test_what_was_given_is_told_from_defaults():
    parser = Parser("x")
    add_flags(parser)
    args = parser.parse_args(["--max_output_len", "1", "--kv_cache_free_gpu_mem_fraction", "0.9", "--top_k=3"])
    assert args.given == {"max_output_len", FRACTION, "top_k"} and "given" not in vars(args)
    assert (args.engine_dir, args.num_beams, args.chat, args.device) == ("engine_outputs", None, False, "auto")


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


def test_what_a_greedy_line_does_not_use_is_said_once_with_its_first_line(engine, tmp_path, capsys):
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "top_k": 1, "temperature": 0.5, "random_seed": 3},
        {"prompt": "a", "top_k": 4, "temperature": 0.5, "random_seed": 3},
        {"prompt": "a", "top_k": 1, "repetition_penalty": 1.0, "max_output_len": 1},
        *[{"prompt": "a", "top_k": 1, "temperature": 0.5}] * 2,
        {"prompt": "a", "temperature": 0.0, "top_p": 0.5},
    ]
    assert run.main(prompt_file(engine, tmp_path, rows)) == 0
    greedy, path = "is greedy decoding, where", tmp_path / "prompts.jsonl"
    assert told(capsys) == [
        f"{path} line 2 and 2 others: top_k 1 {greedy} temperature changes nothing",
        f"{path} line 2: top_k 1 {greedy} random_seed changes nothing",
        f"{path} line 7: temperature 0 {greedy} top_p changes nothing",
    ]


def test_a_line_is_told_of_what_it_has_itself_beside_a_greedy_flag(engine, tmp_path, capsys):
    rows = [{"prompt": "a"}, {"prompt": "a", "top_p": 0.5}]
    assert run.main(prompt_file(engine, tmp_path, rows, "--top_k", "1")) == 0
    path = tmp_path / "prompts.jsonl"
    assert told(capsys) == [f"{path} line 2: top_k 1 is greedy decoding, where top_p changes nothing"]


def prompt_file(engine, folder, rows, *more) -> list[str]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--prompt_file", str(path), "--output_jsonl", str(folder / "out.jsonl")]
    return ["--engine_dir", str(engine), *files, "--max_output_len", "1", *more]


# summarize.py


@pytest.mark.parametrize("flag", ["--hf_device cpu", "--lora_dir x"])
def test_a_flag_of_the_transformers_side_alone(engine, capsys, flag):
    name = flag.split()[0]
    sentence = f"{name} is for --test_hf, which is not given; add that, or leave {name} out"
    scripts.refused(summarize.main, ["--test_trt_llm", "--engine_dir", str(engine), *flag.split()], sentence, capsys)


@pytest.mark.parametrize("flag", ["--no_weight_copies", "--no_prefix_caching", f"--{FRACTION} 0.9", "--check_accuracy"])
def test_a_flag_of_the_engine_alone(capsys, flag):
    sentence = f"{flag.split()[0]} is for --test_trt_llm, which is not given"
    scripts.refused(summarize.main, ["--test_hf", "--hf_model_dir", CHECKPOINT, *flag.split()], sentence, capsys)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--test_trt_llm --length_penalty 3", "length_penalty 3.0 belongs to beam search; give --num_beams above 1"),
        ("--test_trt_llm --num_beams 2 --top_k 1", "num_beams 2 searches and does not sample; leave --top_k out"),
        ("--test_trt_llm --eval_ppl --dataset_path a.txt --top_k 1", "leave --top_k out"),
        ("--test_trt_llm --tensorrt_llm_rouge1_threshold 15", "is what --check_accuracy judges by"),
        ("--test_hf --hf_model_dir x --device cpu --hf_device cpu", "which is given alone; leave --device out"),
    ],
)
def test_other_flags_of_summarize_without_effect(capsys, flags, sentence):
    scripts.refused(summarize.main, flags.split(), sentence, capsys)


def test_what_greedy_summaries_do_not_use_is_said(engine, articles, capsys):
    flags = ["--test_trt_llm", "--engine_dir", str(engine), "--dataset_path", str(articles), "--output_len", "1"]
    assert summarize.main(flags) == 0
    assert told(capsys) == []
    drawn = ["--temperature", "0.5", "--random_seed", "4", "--top_p", "0.4", "--top_k", "1"]
    assert summarize.main([*flags, *drawn, "--data_type", "fp32", "--hf_model_dir", CHECKPOINT]) == 0
    assert told(capsys) == [
        "data_type fp32 is for --test_hf; the engine is float32",
        f"hf_model_dir {CHECKPOINT} is for --test_hf; the engine has its own tokenizer",
        *(f"top_k 1 is greedy decoding, where --{n} changes nothing" for n in ("top_p", "temperature", "random_seed")),
    ]


def test_an_engine_s_folder_beside_the_checkpoint_alone_is_told_of(articles, capsys):
    flags = ["--test_hf", "--hf_model_dir", CHECKPOINT, "--dataset_path", str(articles), "--output_len", "1"]
    assert summarize.main(flags) == 0
    assert told(capsys) == []
    assert summarize.main([*flags, "--engine_dir", "/nowhere"]) == 0
    assert told(capsys) == ["engine_dir /nowhere is for --test_trt_llm; the checkpoint alone is measured"]


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


def test_the_least_share_of_the_memory_is_stated_once(engine, capsys, monkeypatch):
    for module in (open_settings, memory_flags):
        monkeypatch.setattr(module, "LEAST_FRACTION", 0.005)
    flags = ["--engine_dir", str(engine), "--input_text", "a", "--max_output_len", "1", f"--{FRACTION}"]
    sentence = f"{FRACTION} 0.004 is out of range; use 0.005 to 1.0"
    scripts.refused(run.main, [*flags, "0.004"], sentence, capsys)
    with pytest.raises(ConfigError, match=sentence):
        LLM(engine, kv_cache_free_gpu_mem_fraction=0.004)
    assert run.main([*flags, "0.006"]) == 0


# What an engine or a device does not heed


def test_run_says_which_flag_its_engine_does_not_heed(engine, tmp_path, capsys):
    flags = ["--engine_dir", str(engine), "--input_text", "a", "--max_output_len", "1", "--device", "cpu"]
    memory = [f"--{FRACTION}", "0.5", "--no_prefix_caching", "--no_weight_copies"]
    assert run.main([*flags, *memory]) == 0
    sentence = "--no_weight_copies changes nothing: copies are of INT8 and INT4 weights, and the engine has others"
    assert told(capsys) == [sentence]
    assert run.main(prompt_file(engine, tmp_path, [{"prompt": "a"}], *memory)) == 0
    assert told(capsys) == [sentence]


CPU = "--no_weight_copies changes nothing: on a CPU no copies of weights are kept"
PLAN = [
    "--no_weight_copies changes nothing: TensorRT keeps no copies of weights",
    f"--{FRACTION} changes nothing: TensorRT has no paged KV cache",
    "--no_prefix_caching changes nothing: TensorRT has no paged KV cache",
]


@pytest.mark.parametrize(
    ("engines", "device", "given", "said"),
    [
        ([("torch", "int8")], "cpu", True, [CPU]),
        ([("torch", "int4")], "cuda", True, []),
        ([("tensorrt_rtx", "int8")], "cuda", True, PLAN),
        ([("tensorrt_rtx", "int8")], "cuda", False, []),
        ([("tensorrt_rtx", "int8"), ("torch", "int8")], "cuda", True, []),
        ([("tensorrt", "int8"), ("torch", "int8")], "cpu", True, [f"{PLAN[0]}; {CPU.partition(': ')[2]}"]),
    ],
)
def test_what_no_engine_heeds_is_said(monkeypatch, caplog, engines, device, given, said):
    monkeypatch.setattr("baichuan.api.unused_settings.resolve_device", lambda name: name)
    parser = Parser("x")
    add_flags(parser)
    memory = [f"--{FRACTION}", "0.9", "--no_prefix_caching", "--no_weight_copies"] if given else []
    args = parser.parse_args(["--max_output_len", "1", "--device", device, *memory])
    with caplog.at_level(logging.INFO, "baichuan"):
        say_unused(args, SamplingConfig(), [described(*each) for each in engines])
    assert caplog.messages == said


def described(backend: str, weights: str) -> SimpleNamespace:
    """Of an engine's record what the log's lines are about."""
    return SimpleNamespace(backend=BACKENDS[backend], quant=QuantConfig(weights=weights))


@pytest.mark.parametrize(
    ("engine_of", "given", "said"),
    [
        (
            ("torch", "int8"),
            {"keep_copies": False},
            ["keep_copies False changes nothing: on a CPU no copies of weights are kept"],
        ),
        (("torch", "int8"), {FRACTION: 0.5}, []),
        (("tensorrt", "int8"), {}, []),
        (
            ("tensorrt", "int8"),
            {"keep_copies": False, FRACTION: 0.5},
            [
                "keep_copies False changes nothing: TensorRT keeps no copies of weights",
                f"{FRACTION} 0.5 changes nothing: TensorRT has no paged KV cache",
            ],
        ),
    ],
)
def test_which_of_llm_s_arguments_changes_nothing_is_said(caplog, engine_of, given, said):
    with caplog.at_level(logging.INFO, "baichuan"):
        say_unused_arguments(described(*engine_of), OpenSettings("cpu", **given), prefix_caching=True)
    assert caplog.messages == said


def test_llm_says_it_once_when_it_is_loaded(engine, monkeypatch, caplog):
    monkeypatch.setattr("baichuan.executors.torch_backend.TorchBackend.paged", False)
    llm = LLM(engine, device="cpu", keep_copies=False, prefix_caching=False)
    with caplog.at_level(logging.INFO, "baichuan"):
        llm.load()
        llm.load()
    assert [message for message in caplog.messages if "changes nothing" in message] == [
        "keep_copies False changes nothing: copies are of INT8 and INT4 weights, and the engine has others",
        "prefix_caching False changes nothing: PyTorch has no paged KV cache",
    ]
