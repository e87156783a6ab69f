"""An engine's own tokenizer and generation settings: carried by every build, verified, and no other one accepted."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import goldens
import pytest
import scripts
from scripts import refused

import build
import hf_baichuan_convert
import run
import summarize
from baichuan.engine.folder import read_engine
from baichuan.engine.text import open_text, require_text
from baichuan.errors import CheckpointError, ConfigError, EngineError
from baichuan.text.settings import SAMPLING_DEFAULTS, TEXT_FILES, sampling_defaults

VERSION = "v2_13b"
OTHER = "v1_7b"  # whose tokenizer has as many pieces
TEXT = ["--input_text", "The river 长江", *scripts.GREEDY]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return scripts.built(tmp_path_factory.mktemp("engine"), VERSION)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """An engine of a checkpoint that has weights alone."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(goldens.checkpoint(VERSION), folder / "checkpoint", ignore=shutil.ignore_patterns(*TEXT_FILES))
    given = scripts.build_flags(folder / "engine", VERSION, "--no_self_check", "--log_level", "error")
    given[given.index("--model_dir") + 1] = str(folder / "checkpoint")
    assert build.main(given) == 0
    return folder / "engine"


def test_an_engine_carries_its_checkpoints_text_files(engine):
    for name in TEXT_FILES:
        assert (engine / name).read_bytes() == (goldens.checkpoint(VERSION) / name).read_bytes()
    assert set(read_engine(engine).text_files) == set(TEXT_FILES) and not read_engine(engine).dummy


def test_an_engine_runs_without_a_tokenizer_dir_and_with_its_own(engine, capsys):
    outputs = []
    for more in ([], ["--tokenizer_dir", str(goldens.checkpoint(VERSION))]):
        assert run.main(["--engine_dir", str(engine), *TEXT, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith('Input: "The river 长江"\nOutput: "')


def test_the_chat_needs_no_tokenizer_dir(engine):
    command = scripts.script("run.py", ["--engine_dir", str(engine), "--chat", *scripts.GREEDY])
    done = subprocess.run(command, input=b"Hello\n", env=scripts.ENVIRONMENT, capture_output=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout.decode().split("> ")[1].strip()) > 0, done.stderr.decode()


def test_another_tokenizer_is_refused(engine, capsys):
    foreign = str(goldens.checkpoint(OTHER))
    sentence = "(1000 pieces) is not the tokenizer of the engine in"
    refused(run.main, ["--engine_dir", str(engine), *TEXT, "--tokenizer_dir", foreign], sentence, capsys)
    given = ["--test_trt_llm", "--engine_dir", str(engine), "--tokenizer_dir", foreign, "--output_len", "2"]
    refused(summarize.main, given, sentence, capsys)


def test_a_foreign_tokenizer_is_not_given_to_transformers_alone(capsys):
    given = ["--test_hf", "--hf_model_dir", str(goldens.checkpoint(VERSION)), "--data_type", "fp32"]
    sentence = "is not of a v2_13b model: tokenizer.model with a space before the text"
    refused(summarize.main, [*given, "--tokenizer_dir", str(goldens.checkpoint(OTHER))], sentence, capsys)


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_changed_text_file_is_refused(engine, tmp_path, capsys, name):
    shutil.copytree(engine, tmp_path / "engine")
    content = bytearray((tmp_path / "engine" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "engine" / name).write_bytes(content)
    refused(run.main, ["--engine_dir", str(tmp_path / "engine"), *TEXT], f"{name} differs from what the build", capsys)
    (tmp_path / "engine" / name).unlink()
    with pytest.raises(EngineError, match=f"{name} is missing"):
        open_text(read_engine(tmp_path / "engine"), None)


def test_an_engine_without_a_tokenizer_asks_for_one_that_fits(bare, capsys):
    sentence = f"the engine in {bare} has none, for what it was built from had no tokenizer.model; give --tokenizer_dir"
    refused(run.main, ["--engine_dir", str(bare), *TEXT], sentence, capsys)
    refused(summarize.main, ["--engine_dir", str(bare), "--test_trt_llm", "--output_len", "2"], sentence, capsys)
    own, foreign = goldens.checkpoint(VERSION), goldens.checkpoint(OTHER)
    assert run.main(["--engine_dir", str(bare), *TEXT, "--tokenizer_dir", str(own / "tokenizer.model")]) == 0
    sentence = "is not of a v2_13b model: tokenizer.model with a space before the text (fits v1_7b, v1_13b)"
    capsys.readouterr()
    refused(run.main, ["--engine_dir", str(bare), *TEXT, "--tokenizer_dir", str(foreign)], sentence, capsys)


def test_ids_need_no_tokenizer(bare, tmp_path):
    prompts = scripts.prompts_csv(tmp_path / "prompts.csv", VERSION, (7,))
    assert run.main(scripts.run_flags(bare, prompts, tmp_path)) == 0
    scripts.check_outputs(tmp_path, VERSION, (7,))


def test_the_build_says_that_a_checkpoint_has_no_tokenizer(tmp_path, capsys):
    checkpoint = shutil.copytree(goldens.checkpoint(VERSION), tmp_path / "checkpoint")
    (checkpoint / "tokenizer.model").unlink()
    given = scripts.build_flags(tmp_path / "engine", VERSION, "--no_self_check", "--log_level", "warning")
    given[given.index("--model_dir") + 1] = str(checkpoint)
    assert build.main(given) == 0
    assert (
        "has no tokenizer.model, so the engine gets none: run.py will need --tokenizer_dir" in capsys.readouterr().err
    )


def test_a_tokenizer_of_another_size_is_not_built_in(tmp_path, capsys):
    """config.json of a released size, tokenizer.model of a thousand pieces."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    values = json.loads((goldens.checkpoint(VERSION) / "config.json").read_text()) | {"vocab_size": 125696}
    (checkpoint / "config.json").write_text(json.dumps(values))
    shutil.copy(goldens.checkpoint(VERSION) / "tokenizer.model", checkpoint)
    sentence = (
        "has 1000 pieces and the model's vocabulary 125696; give the tokenizer.model of the model's own checkpoint"
    )
    refused(build.main, ["--model_dir", str(checkpoint), "--output_dir", str(tmp_path / "engine")], sentence, capsys)


def test_a_binary_folder_brings_the_text_files_along(tmp_path, capsys):
    text = tmp_path / "texts.txt"
    text.write_text("Rain fell.\n")
    given = ["-i", str(goldens.checkpoint(VERSION)), "-o", str(tmp_path / "out"), "-kv", "--calib_size", "1"]
    assert hf_baichuan_convert.main([*given, "--calib_dataset", str(text)]) == 0
    flags = ["--bin_model_dir", str(tmp_path / "out/1-gpu"), "--int8_kv_cache", "--dtype", "float32"]
    assert build.main([*flags, "--output_dir", str(tmp_path / "engine")]) == 0
    assert set(read_engine(tmp_path / "engine").text_files) == set(TEXT_FILES)
    capsys.readouterr()
    assert run.main(["--engine_dir", str(tmp_path / "engine"), *TEXT]) == 0
    assert capsys.readouterr().out.startswith('Input: "The river 长江"')


def test_a_rebuild_without_a_tokenizer_leaves_no_old_one(engine, tmp_path):
    folder = shutil.copytree(engine, tmp_path / "engine")
    dummy = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--inter_size", "32", "--vocab_size", "300"]
    assert build.main(["--output_dir", str(folder), *dummy]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["baichuan_float16_tp1_rank0.engine", "config.json"]


# Generation settings


def test_the_settings_of_the_checkpoint_are_the_defaults(tmp_path):
    golden = goldens.checkpoint(VERSION)
    assert sampling_defaults(VERSION, golden) == SAMPLING_DEFAULTS[VERSION] == sampling_defaults(VERSION, tmp_path)
    settings = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2, "eos_token_id": [3, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    found = sampling_defaults("v1_7b", tmp_path)
    assert (found.temperature, found.top_k, found.top_p, found.repetition_penalty) == (0.5, 7, 0.9, 1.2)
    assert (found.eos_id, found.stop_ids) == (3, (9,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.0}))
    assert sampling_defaults(VERSION, tmp_path).greedy


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": "warm"}, "has temperature 'warm'; correct it, or remove it"),
        ({"top_k": True}, "has top_k True"),
        ({"eos_token_id": "</s>"}, "has eos_token_id '</s>'"),
        ({"top_p": 2}, "cannot be used: top_p 2 is out of range"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, values, sentence):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as error:
        sampling_defaults(VERSION, tmp_path)
    assert sentence in str(error.value)


def test_an_end_of_ones_own_ends_the_text(engine, tmp_path, capsys):
    """generation_config.json names the token that greedy decoding takes third; the engine stops there."""
    prompts = scripts.prompts_csv(tmp_path / "prompts.csv", VERSION, (7,))
    end = goldens.golden(VERSION)["gen_7"].tolist()[2]
    checkpoint = shutil.copytree(goldens.checkpoint(VERSION), tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    given = scripts.build_flags(tmp_path / "engine", VERSION, "--no_self_check")
    given[given.index("--model_dir") + 1] = str(checkpoint)
    assert build.main(given) == 0
    assert run.main(scripts.run_flags(tmp_path / "engine", prompts, tmp_path)) == 0
    assert "2 new tokens, finish reason stop" in capsys.readouterr().err


def test_dummy_engines_say_so_everywhere(tmp_path, capsys):
    sizes = ["--n_layer", "1", "--n_embd", "32", "--n_head", "2", "--inter_size", "32", "--vocab_size", "1000"]
    folder = tmp_path / "engine"
    assert build.main(["--output_dir", str(folder), "--dtype", "float32", *sizes]) == 0
    err = capsys.readouterr().err.replace(str(folder), "")
    assert "the engine gets dummy weights and its text means nothing" in err and "100" not in err
    assert "self-check skipped: dummy weights" in err
    with pytest.raises(ConfigError, match="for it has dummy weights; give --tokenizer_dir"):
        require_text(read_engine(folder), open_text(read_engine(folder), None))
    (tmp_path / "ids.csv").write_text("5,6,7\n")
    ids = ["--input_tokens", str(tmp_path / "ids.csv"), "--max_output_len", "3", "--log_level", "warning"]
    assert run.main(["--engine_dir", str(folder), *ids]) == 0
    assert capsys.readouterr().err == f"the engine in {folder} has dummy weights: its text means nothing\n"
    (tmp_path / "a.jsonl").write_text('{"article": "Rain.", "highlights": "Rain."}\n')
    given = ["--test_trt_llm", "--engine_dir", str(folder), "--dataset_path", str(tmp_path / "a.jsonl")]
    given += ["--tokenizer_dir", str(goldens.checkpoint(OTHER)), "--output_len", "2"]
    assert summarize.main(given) == 0
    done = capsys.readouterr()
    assert "has dummy weights: its text means nothing" in done.err and "dummy weights" in done.out
