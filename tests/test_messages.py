"""Mistakes that people make: each ends in one sentence that says what was meant or what to do."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import goldens
import pytest
import scripts
import torch

import build
import hf_baichuan_convert
import run
import summarize
from baichuan import __version__
from baichuan.api.llm import LLM
from baichuan.cli import common
from baichuan.config import SamplingConfig
from baichuan.engine.folder import read_engine
from baichuan.errors import UnsupportedError
from baichuan.executors import device
from baichuan.executors.open_settings import OpenSettings
from baichuan.executors.registry import BACKENDS
from baichuan.parallel.comm import Solo
from baichuan.util.library_logs import through_our_log

VERSION = "v1_7b"
MAINS = {"build": build.main, "run": run.main, "summarize": summarize.main, "convert": hf_baichuan_convert.main}
NEEDED = {"build": [], "run": ["--max_output_len", "2"], "summarize": ["--test_trt_llm"], "convert": []}


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> dict[str, Path]:
    """Calibrated folders, with -kv and with -sq; OUT and not OUT/1-gpu."""
    folder = tmp_path_factory.mktemp("binary")
    (folder / "texts.txt").write_text("Rain fell.\n")
    for kind in (["-kv"], ["-sq", "0.5"]):
        given = ["-i", str(goldens.checkpoint(VERSION)), "-o", str(folder / kind[0]), *kind, "--calib_size", "1"]
        assert hf_baichuan_convert.main([*given, "--calib_dataset", str(folder / "texts.txt")]) == 0
    return {"-kv": folder / "-kv", "-sq": folder / "-sq"}


def last_line(main, given: list[str], capsys, code: int = 2) -> str:
    found, err = scripts.code_of(main, given), capsys.readouterr().err
    assert found == code and "Traceback" not in err, err
    return err.splitlines()[-1]


# Flags


@pytest.mark.parametrize("name", MAINS)
def test_every_script_says_its_version(name, capsys):
    with pytest.raises(SystemExit) as stop:
        MAINS[name](["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"Baichuan engines {__version__}\n"


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("run", ["--engin_dir", "x", "--max_output_len", "2"], "--engin_dir, did you mean --engine_dir?"),
        ("run", ["--max_new_tokens", "5"], "--max_new_tokens, did you mean --max_output_len?"),
        ("run", ["--max-new-tokens=5"], "--max-new-tokens, did you mean --max_output_len?"),
        ("run", ["--max-output-len", "5"], "--max-output-len, did you mean --max_output_len?"),
        ("build", ["--tp_size", "2"], "--tp_size, did you mean --world_size?"),
        ("build", ["--use_weight_onyl"], "--use_weight_onyl, did you mean --use_weight_only?"),
        ("summarize", ["--hf_model", "x"], "--hf_model, did you mean --hf_model_dir?"),
        ("convert", ["--smoothquent", "0.5"], "--smoothquent, did you mean --smoothquant?"),
        ("run", ["--quux"], "unrecognized arguments: --quux; "),
    ],
)
def test_a_flag_that_is_not_known_names_the_one_that_was_meant(name, given, meant, capsys):
    assert meant in last_line(MAINS[name], given, capsys)


def test_a_value_that_looks_like_a_flag_in_a_sentence_is_a_value(engine, capsys):
    given = ["--engine_dir", str(engine), "--input_text", "--x is unknown", "--max_output_len", "1", "--top_k", "1"]
    assert run.main(given) == 0


def test_one_default_engine_folder(tmp_path, monkeypatch, capsys):
    """build.py and run.py without a folder meet."""
    monkeypatch.chdir(tmp_path)
    given = scripts.build_flags(tmp_path, VERSION, "--no_self_check")
    del given[given.index("--output_dir") : given.index("--output_dir") + 2]
    assert build.main(given) == 0
    assert run.main(["--input_text", "The river", "--max_output_len", "2"]) == 0
    article = tmp_path / "a.jsonl"
    article.write_text('{"article": "Rain.", "highlights": "Rain."}\n')
    assert summarize.main(["--test_trt_llm", "--dataset_path", str(article), "--output_len", "2"]) == 0


def test_temperature_0_is_greedy(engine, tmp_path):
    assert SamplingConfig(temperature=0, top_k=50).greedy
    prompts = scripts.prompts_csv(tmp_path / "prompts.csv", VERSION, (7,))
    flags = scripts.run_flags(engine, prompts, tmp_path, "--temperature", "0", "--top_k", "50")
    assert run.main(flags) == 0
    scripts.check_outputs(tmp_path, VERSION, (7,))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--top_k 1 --temperature 0.5", ["top_k 1 is greedy decoding, where --temperature changes nothing"]),
        ("--temperature 0 --top_k 7", ["temperature 0 is greedy decoding, where --top_k changes nothing"]),
        ("--top_k 1", []),
        ("--top_k 5 --temperature 0.5 --random_seed 3", []),
    ],
)
def test_what_greedy_decoding_does_not_use_is_said(engine, given, said, capsys):
    flags = ["--engine_dir", str(engine), "--input_text", "The river", "--max_output_len", "1", *given.split()]
    assert run.main(flags) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "greedy" in line] == said


def test_an_empty_prompt_is_not_told_to_be_shorter(engine, capsys):
    line = last_line(run.main, ["--engine_dir", str(engine), "--input_text", "", "--max_output_len", "2"], capsys)
    assert "the prompt is empty; give it at least one word" in line


def test_a_prompt_that_fails_leaves_the_others_their_texts(engine, tmp_path, capsys, monkeypatch):
    """The KV cache has three blocks of 64 tokens, as one sequence needs; two beams share only what is full."""
    scripts.leave_blocks(3, read_engine(engine), monkeypatch)
    (tmp_path / "in.csv").write_text("5,6,7\n" + ",".join(["5"] * 120) + "\n5,6\n")
    given = ["--engine_dir", str(engine), "--device", "cpu", "--max_output_len", "20", "--num_beams", "2"]
    given += ["--input_tokens", str(tmp_path / "in.csv"), "--output_csv", str(tmp_path / "out.csv")]
    assert run.main(given) == 2
    out, err = capsys.readouterr()
    assert out.count("Output: ") == 2 and not (tmp_path / "out.csv").exists()
    assert "error: prompt 1: the request needs up to 6 blocks of 64 tokens" in err.splitlines()[-1]


# One folder in the place of another


def written(folder: Path, name: str, content: dict | str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_what_is_no_engine_is_recognised(binary, tmp_path, capsys):
    old = written(tmp_path / "old", "config.json", {"builder_config": {"precision": "float16"}, "plugin_config": {}})
    newer = written(tmp_path / "newer", "config.json", {"version": "0.9", "pretrained_config": {}, "build_config": {}})
    for folder, sentence in {
        goldens.checkpoint(VERSION): "is a checkpoint; build an engine from it with build.py --model_dir",
        binary["-kv"] / "1-gpu": "is a calibrated binary folder; build from it with build.py --bin_model_dir",
        old: "is an engine of TensorRT-LLM, which only the TensorRT-LLM that built it can run; build one from",
        newer: "is an engine of TensorRT-LLM",
        old / "config.json": f"is a file; give the folder that holds it, {old}",
    }.items():
        for name in ("run", "summarize"):
            assert sentence in last_line(MAINS[name], [*NEEDED[name], "--engine_dir", str(folder)], capsys)


def test_what_is_no_checkpoint_is_recognised(engine, binary, tmp_path, capsys):
    lora = written(tmp_path / "lora", "adapter_config.json", {"base_model_name_or_path": "baichuan-inc/X"})
    written(lora, "adapter_model.safetensors")
    gguf = written(tmp_path / "gguf", "model-q4_0.gguf")
    shutil.copy(goldens.checkpoint(VERSION) / "config.json", written(tmp_path / "c", "pytorch_model.bin"))
    for path, sentence in {
        lora: "is a LoRA adapter of baichuan-inc/X, not a whole model; give that one's folder, and the adapter",
        gguf: "is in llama.cpp's GGUF format, which is not read",
        gguf / "model-q4_0.gguf": "is in llama.cpp's GGUF format, which is not read",
        tmp_path
        / "c/pytorch_model.bin": f"of weights alone; give the folder that holds it with config.json, {tmp_path}/c",
        engine: "is an engine; run it with run.py --engine_dir",
        binary["-kv"] / "1-gpu": "is a calibrated binary folder; build from it with build.py --bin_model_dir",
    }.items():
        out = ["--output_dir", str(tmp_path / "engine")]
        assert sentence in last_line(build.main, ["--model_dir", str(path), *out], capsys)
        given = ["-i", str(path), "-o", str(tmp_path / "out"), "-kv"]
        assert sentence in last_line(hf_baichuan_convert.main, given, capsys)
    assert not (tmp_path / "engine").exists()


def test_what_is_no_binary_folder_is_recognised(binary, capsys):
    out = binary["-kv"]
    line = last_line(build.main, ["--bin_model_dir", str(out)], capsys)
    assert f"bin_model_dir {out} is the folder above 1-gpu; give {out}/1-gpu" in line
    line = last_line(build.main, ["--bin_model_dir", str(goldens.checkpoint(VERSION))], capsys)
    assert "is a checkpoint; build an engine from it with build.py --model_dir" in line


# A calibration that is not used


@pytest.mark.parametrize(
    ("kind", "flags", "sentence"),
    [
        ("-kv", [], "was calibrated for an 8-bit KV cache or FP8 and the engine is not quantised; add --int8_kv_cache"),
        ("-kv", ["--use_weight_only"], "and the engine is quantised to int8 alone; add --int8_kv_cache"),
        ("-kv", ["--int8_kv_cache"], None),
        ("-kv", ["--enable_fp8"], None),
        ("-kv", ["--enable_fp8", "--per_token", "--per_channel"], "and the engine is quantised to fp8 alone; add"),
        ("-sq", [], "was calibrated for SmoothQuant and the engine is not quantised; add --use_smooth_quant"),
        ("-sq", ["--use_smooth_quant"], None),
    ],
)
def test_a_calibration_that_is_not_used_is_said(binary, tmp_path, capsys, kind, flags, sentence):
    given = ["--bin_model_dir", str(binary[kind] / "1-gpu"), "--output_dir", str(tmp_path / "engine"), *flags]
    assert build.main([*given, "--no_self_check"]) == 0
    err = capsys.readouterr().err
    assert sentence in err if sentence else "was calibrated for" not in err


# Devices


def test_a_gpu_that_pytorch_cannot_use_is_a_warning(engine, monkeypatch, capsys):
    monkeypatch.setattr(device, "driver_gpus", lambda: ["NVIDIA H100, 580.82"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = ["--engine_dir", str(engine), "--input_text", "The river", "--max_output_len", "1"]
    sentence = "running on the CPU: NVIDIA H100, 580.82 is there and "
    for more, said in {"auto": True, "cpu": False}.items():
        assert run.main([*given, "--device", more]) == 0
        assert (sentence in capsys.readouterr().err) == said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run.main(given) == 0
    assert sentence not in capsys.readouterr().err


@pytest.mark.parametrize("name", MAINS)
def test_a_device_that_is_not_there_is_refused(name, engine, tmp_path, capsys):
    needed = {"convert": ["-i", "x", "-o", str(tmp_path), "-kv"]}.get(name, NEEDED[name])
    line = last_line(MAINS[name], [*needed, "--device", "cuda"], capsys)
    assert "device cuda needs a GPU and " in line and line.split(";")[-1] == " use --device cpu"


def test_the_device_reaches_the_executor(engine, monkeypatch):
    """With a GPU that is there, --device cpu still runs on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve_device("auto") == device.resolve_device("cuda") == "cuda"
    given = ["--engine_dir", str(engine), "--input_text", "The river", "--max_output_len", "1", "--device", "cpu"]
    assert run.main(given) == 0


def test_a_tensorrt_plan_is_not_run_on_the_cpu():
    with pytest.raises(UnsupportedError, match="device cpu cannot run a TensorRT plan; leave --device out"):
        BACKENDS["tensorrt_rtx"].open_rank(SimpleNamespace(settings=OpenSettings(device="cpu")))


# What cannot be done is said before anything is loaded


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--output_len", "25"], "max_output_len 25 is out of the engine's range 1 to 24"),
        (["--num_beams", "3"], "num_beams 3 exceeds the engine's max_beam_width 2"),
        ([], "tokens and the engine takes 1 to 128"),
        (["--test_hf", "--num_beams", "2", "--repetition_penalty", "1.2"], "leave one out, or --test_hf"),
        (["--test_hf", "--hf_model_dir", "/nowhere"], "/nowhere is neither a folder"),
        (["--test_hf", "--hf_model_dir", str(goldens.checkpoint("v2_13b"))], "contradicts model_version v1_7b"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "-",
)
def test_summarize_checks_before_it_loads(engine, tmp_path, capsys, monkeypatch, flags, sentence):
    def loaded(*_):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(LLM, "load", loaded)
    rows = [{"article": "Rain fell. " * 40, "highlights": "Rain."}] * 5
    (tmp_path / "articles.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--test_trt_llm", "--engine_dir", str(engine), "--dataset_path", str(tmp_path / "articles.jsonl")]
    given += ["--hf_model_dir", str(goldens.checkpoint(VERSION)), "--output_len", "2", *flags]
    assert sentence in last_line(summarize.main, given, capsys)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_output_len", "25", "--chat"], "max_output_len 25 is out of the engine's range 1 to 24"),
        (["--max_output_len", "2", "--input_text", "word " * 200], "tokens and the engine takes 1 to 128"),
    ],
)
def test_run_checks_before_it_loads(engine, capsys, monkeypatch, flags, sentence):
    monkeypatch.setattr(LLM, "load", None)
    assert sentence in last_line(run.main, ["--engine_dir", str(engine), *flags], capsys)


@pytest.mark.parametrize(("level", "shown"), [("error", False), ("warning", True)])
def test_messages_of_libraries_heed_the_level(level, shown, capsys):
    """transformers' loggers have a level of their own, whatever the root logger's is."""
    through_our_log("transformers")
    common.configure_logging(level, Solo())
    logging.getLogger("transformers.generation.stopping_criteria").warning("a friendly reminder")
    assert ("a friendly reminder" in capsys.readouterr().err) == shown
