"""build.py and run.py as their users start them: the goldens end to end, every flag's wrong values, interruptions."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import goldens
import numpy as np
import pytest
import scripts
from scripts import refused
from tiny_engine import snapshot

import build
import run
import summarize
from baichuan.engine import runtime
from baichuan.engine.folder import CONFIG_NAME
from baichuan.executors import torch_backend
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.generation import token_files
from baichuan.util.publishing import staged_folder

VERSION = "v1_7b"


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return {version: scripts.built(folder / version, version) for version in goldens.VERSIONS_WITH_GOLDENS}


@pytest.fixture(scope="module")
def engine(engines) -> Path:
    return engines[VERSION]


@pytest.fixture
def prompts(tmp_path) -> Path:
    return scripts.prompts_csv(tmp_path / "prompts.csv", VERSION, (7,))


# The goldens


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


# What run.py offers besides


def text_flags(engine: Path, *more: str) -> list[str]:
    return ["--engine_dir", str(engine), "--tokenizer_dir", str(goldens.checkpoint(VERSION)), *scripts.GREEDY, *more]


def test_streaming_prints_the_same_text(engine, capsys):
    outputs = []
    for more in ([], ["--streaming"]):
        assert run.main(text_flags(engine, "--input_text", "The river 长江", *more)) == 0
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
        assert run.main(text_flags(engine, *more)) == 0
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


def test_an_output_that_nobody_reads(engine):
    reader, writer = os.pipe()
    os.close(reader)
    command = scripts.script("run.py", text_flags(engine, "--input_text", "The river"))
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=scripts.ENVIRONMENT, timeout=60)
    os.close(writer)
    err = done.stderr.decode()
    assert done.returncode == 2 and "nobody reads the output" in scripts.sentences(err)[0], err
    assert "Traceback" not in err and "Exception ignored" not in err, err


def test_a_locale_without_chinese_changes_no_file_and_no_text(engine, tmp_path):
    """PYTHONUTF8=0 makes ASCII the encoding of every file that is opened without naming one."""
    ascii_only = scripts.ENVIRONMENT | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = []
    for environment in (scripts.ENVIRONMENT, ascii_only):
        out = tmp_path / "ids.csv"
        command = scripts.script("run.py", text_flags(engine, "--output_csv", str(out), "--max_output_len", "4"))
        done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        found.append((done.stdout.decode(), out.read_text()))
    assert found[0] == found[1] and "世界上第二高的山峰是哪座？" in found[0][0]


# Wrong values


def name_of(value: list[str] | str) -> str:
    """A test's name: its flags."""
    return " ".join(value)[:60] if isinstance(value, list) else "-"


BUILD_ERRORS = [
    (["--model_version", "v3_7b"], "invalid choice: 'v3_7b'"),
    (["--model_version", "v2_13b"], "v2_13b"),
    (["--model_dir", "/nowhere"], "/nowhere is neither a folder"),
    (["--model_dir", ""], "model_dir"),
    (["--bin_model_dir", "/nowhere"], "/nowhere"),
    (["--bin_model_dir", ""], "bin_model_dir"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--log_level", "loud"], "invalid choice: 'loud'"),
    (["--vocab_size", "7"], "--vocab_size 7 contradicts the checkpoint's 1000"),
    (["--n_layer", "x"], "invalid int value: 'x'"),
    (["--n_layer", "4"], "--n_layer 4 contradicts"),
    (["--n_positions", "1"], "--n_positions 1 contradicts"),
    (["--n_embd", "0"], "--n_embd 0 contradicts"),
    (["--n_head", "-1"], "--n_head -1 contradicts"),
    (["--inter_size", "1"], "--inter_size 1 contradicts"),
    (["--hidden_act", "gelu"], "invalid choice: 'gelu'"),
    (["--world_size", "0"], "world_size 0 is out of range"),
    (["--world_size", "-2"], "world_size -2 is out of range"),
    (["--world_size", "3"], "3; use a tp_size that divides it"),
    (["--world_size", "16"], "world_size 16 exceeds gpus_per_node 8"),
    (["--world_size", "0", "--use_weight_only", "--weight_only_precision", "int4"], "world_size 0 is out of range"),
    (["--world_size", "3", "--use_weight_only", "--weight_only_precision", "int4"], "3; use a tp_size"),
    (["--gpus_per_node", "0"], "gpus_per_node 0"),
    (["--max_batch_size", "0"], "max_batch_size 0 is out of range"),
    (["--max_batch_size", "1.5"], "invalid int value: '1.5'"),
    (["--max_input_len", "0"], "max_input_len 0 is out of range"),
    (["--max_input_len", "99999999"], "max_input_len 99999999 is out of range"),
    (["--max_output_len", "-1"], "max_output_len -1 is out of range"),
    (["--max_beam_width", "65"], "max_beam_width 65 is out of range"),
    (["--max_num_tokens", "-1"], "max_num_tokens -1 is out of range"),
    (["--backend", "onnx"], "invalid choice: 'onnx'"),
    (["--logits_dtype", "bfloat16"], "invalid choice: 'bfloat16'"),
    (["--use_gpt_attention_plugin", "maybe"], "invalid choice: 'maybe'"),
    (["--use_gemm_plugin", "float16"], "--use_gemm_plugin float16 differs from --dtype float32"),
    (["--multi_block_mode", "2"], "invalid choice: '2'"),
    (["--tokens_per_block", "0"], "tokens_per_block 0 is not known"),
    (["--tokens_per_block", "48"], "tokens_per_block 48 is not known"),
    (["--visualize"], "--visualize belongs to TensorRT"),
    (["--enable_debug_output"], "--enable_debug_output belongs to TensorRT"),
    (["--timing_cache", "x"], "--timing_cache belongs to TensorRT"),
    (["--compute_capability", "8.9"], "--compute_capability belongs to TensorRT"),
    (["--weight_only_precision", "int4"], "needs --use_weight_only"),
    (["--use_weight_only", "--weight_only_precision", "int2"], "invalid choice: 'int2'"),
    (["--use_weight_only", "--weight_only_group_size", "64"], "needs INT4 weights"),
    (["--weight_only_group_size", "48"], "invalid choice: 48"),
    (["--quantize_lm_head"], "quantize_lm_head needs int8 or int4"),
    (["--per_token"], "belong to SmoothQuant"),
    (["--per_channel"], "belong to SmoothQuant"),
    (["--use_smooth_quant"], "bin_model_dir"),
    (["--use_smooth_quant", "--use_weight_only"], "exclude each other"),
    (["--int8_kv_cache"], "bin_model_dir"),
    (["--int8_kv_cache", "--fp8_kv_cache"], "exclude each other"),
    (["--enable_fp8", "--use_weight_only"], "exclude each other"),
    (["--quantized_fp8_model_path", "x.npz"], "--quantized_fp8_model_path needs"),
    (
        ["--enable_fp8", "--per_token", "--per_channel", "--quantized_fp8_model_path", "x.npz"],
        "--quantized_fp8_model_path is not used",
    ),
    (["--enable_fp8", "--per_token"], "FP8 needs calibrated scales"),
    (["--enable_fp8", "--quantized_fp8_model_path", "/nowhere.npz"], "/nowhere.npz"),
    (["--enable_fp8", "--quantized_fp8_model_path", ""], "quantized_fp8_model_path"),
    (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
    (["--max_batch", "1"], "unrecognized arguments: --max_batch, did you mean --max_batch_size?"),
    (["--output_dir", "/proc/none"], "output_dir /proc/none cannot be made"),
    (["--output_dir", ""], "output_dir"),
]


@pytest.mark.parametrize(("more", "sentence"), BUILD_ERRORS, ids=name_of)
def test_wrong_flags_of_build(engine, tmp_path, capsys, more, sentence):
    """Into a folder with an engine: it stays as it is."""
    shutil.copytree(engine, tmp_path / "engine")
    before = snapshot(tmp_path / "engine")
    refused(
        build.main, scripts.build_flags(tmp_path / "engine", VERSION, "--backend", "torch", *more), sentence, capsys
    )
    assert snapshot(tmp_path / "engine") == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--n_head", "0"], "num_heads 0 is out of range"),
        (["--n_head", "3"], "hidden_size 4096 is not divisible by num_heads 3"),
        (["--n_layer", "-1"], "num_layers -1 is out of range"),
        (["--vocab_size", "99999999"], "vocab_size 99999999 is out of range"),
        (["--n_embd", "33", "--n_head", "11"], "head_dim 3 is odd"),
        (["--n_positions", "0"], "max_positions 0 is out of range"),
        (["--inter_size", "0"], "intermediate_size 0 is out of range"),
        (["--n_layer", "9999999"], "num_layers 9999999 is out of range"),
        (["--n_embd", "1048576", "--n_head", "8192"], "GB on the disk"),
    ],
    ids=name_of,
)
def test_wrong_sizes_of_dummy_weights(tmp_path, capsys, more, sentence):
    given = ["--model_version", VERSION, "--output_dir", str(tmp_path / "engine"), "--backend", "torch"]
    refused(build.main, [*given, *more], sentence, capsys)
    assert not (tmp_path / "engine").exists() or not list((tmp_path / "engine").iterdir())


RUN_ERRORS = [
    (["--max_output_len", "0"], "max_output_len 0 is out of the engine's range 1 to 24"),
    (["--max_output_len", "25"], "max_output_len 25 is out of the engine's range 1 to 24"),
    (["--max_output_len", "many"], "invalid int value: 'many'"),
    (["--model_version", "v2_7b"], "holds a v1_7b model, not v2_7b"),
    (["--model_version", "v9"], "invalid choice: 'v9'"),
    (["--engine_dir", "/nowhere"], "build an engine into /nowhere first"),
    (["--engine_dir", ""], "engine_dir"),
    (["--tokenizer_dir", "/nowhere"], "there is no tokenizer at /nowhere"),
    (["--tokenizer_dir", ""], "tokenizer_dir"),
    (["--input_tokens", "/nowhere.csv"], "/nowhere.csv cannot be read"),
    (["--input_tokens", ""], "input_tokens"),
    (["--input_tokens", "ids.txt"], "ids.txt"),
    (["--input_text", "a"], "--input_text and --input_tokens are both given"),
    (["--output_csv", "/nowhere/x.csv"], "/nowhere"),
    (["--output_csv", "/proc/x.csv"], "/proc"),
    (["--output_csv", "/"], "output_csv /"),
    (["--output_csv", "/dev/null"], "output_csv /dev/null is a device or a pipe"),
    (["--output_csv", "x", "--output_npy", "./x"], "--output_csv and --output_npy are both x; name two files"),
    (["--input_tokens", "/x.csv", "--output_csv", "/x.csv"], "--input_tokens and --output_csv are both /x.csv"),
    (["--output_csv", ""], "output_csv"),
    (["--output_npy", "/nowhere/x.npy"], "/nowhere"),
    (["--output_npy", ""], "output_npy"),
    (["--output_logits_npy", "/nowhere/x.npy"], "/nowhere"),
    (["--output_logits_npy", ""], "output_logits_npy"),
    (["--chat"], "--chat builds the prompt from text"),
    (["--system", "x"], "--system belongs to a chat"),
    (["--num_beams", "0"], "num_beams 0 is out of range"),
    (["--num_beams", "3"], "num_beams 3 exceeds the engine's max_beam_width 2"),
    (["--num_beams", "2", "--top_k", "3"], "leave --top_k out"),
    (["--num_beams", "2", "--top_p", "0.5"], "leave --top_p out"),
    (["--num_beams", "2", "--random_seed", "1"], "leave --random_seed out"),
    (["--num_beams", "2", "--streaming"], "beams are known at the end"),
    (["--length_penalty", "1"], "belongs to beam search"),
    (["--num_beams", "2", "--length_penalty", "nan"], "length_penalty nan is out of range"),
    (["--top_k", "-1"], "top_k -1 is out of range"),
    (["--top_p", "1.1"], "top_p 1.1 is out of range"),
    (["--top_p", "nan"], "top_p nan is out of range"),
    (["--temperature", "0.0001"], "temperature 0.0001 is out of range"),
    (["--temperature", "0", "--num_beams", "2"], "temperature 0 means greedy decoding and num_beams 2 is a search"),
    (["--temperature", "inf"], "temperature inf is out of range"),
    (["--repetition_penalty", "0"], "repetition_penalty 0.0 is out of range"),
    (["--repetition_penalty", "x"], "invalid float value: 'x'"),
    (["--random_seed", "-1"], "random_seed -1 is out of range"),
    (["--random_seed", "99999999999999999999"], "random_seed 99999999999999999999 is out of range"),
    (["--log_level", "x"], "invalid choice: 'x'"),
    (["--max_output", "3"], "unrecognized arguments"),
    (["--length_penalty", "-1e-3"], "(one that begins with - needs an =, as in --flag=-x)"),
]


@pytest.mark.parametrize(("more", "sentence"), RUN_ERRORS, ids=name_of)
def test_wrong_flags_of_run(engine, prompts, tmp_path, capsys, more, sentence):
    given = ["--engine_dir", str(engine), "--input_tokens", str(prompts), "--max_output_len", "4"]
    refused(run.main, [*given, *more], sentence, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.csv"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "baichuan_float32_tp1_rank0.engine"])
def test_an_output_never_replaces_a_file_of_the_engine(engine, prompts, tmp_path, capsys, name):
    shutil.copytree(engine, tmp_path / "engine")
    (tmp_path / "link").symlink_to(tmp_path / "engine")
    before = snapshot(tmp_path / "engine")
    given = ["--engine_dir", str(tmp_path / "engine"), "--input_tokens", str(prompts), "--max_output_len", "1"]
    refused(run.main, [*given, "--output_csv", str(tmp_path / "link" / name)], "is a file of the engine", capsys)
    assert run.main([*given, "--output_csv", str(tmp_path / "link/mine.csv")]) == 0
    (tmp_path / "engine/mine.csv").unlink()
    assert snapshot(tmp_path / "engine") == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--max_output_len", "4", "--tokenizer_dir", __file__], "is not a SentencePiece model"),
        (["--input_text", "a"], "required: --max_output_len"),
        (text_flags(Path(), "--input_text", "word " * 200), "and the engine takes 1 to 128"),
        (text_flags(Path(), "--input_text", "a", "b", "--streaming"), "--streaming prints one text"),
        (text_flags(Path(), "--input_text", "a\udcff"), "not valid UTF-8"),
        (text_flags(Path(), "--chat", "--output_csv", "x"), "a conversation writes no files"),
    ],
    ids=range(6),
)
def test_wrong_text(engine, capsys, more, sentence):
    refused(run.main, [*more, "--engine_dir", str(engine)], sentence, capsys)


def npy(array: np.ndarray, save=np.save) -> bytes:
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


BAD_FILES = {
    "csv": {
        "empty": (b"", "holds no prompt"),
        "blank": (b"\n , \n", "holds no prompt"),
        "text": (b"5,six\n", "'six'"),
        "floats": (b"5,6.0\n", "'6.0'"),
        "binary": (b"\xff\xfe5\x00", "does not hold token ids"),
        "nul": (b"5,\x006\n", "does not hold token ids"),
        "out of range": (b"5,1000\n", "id 1000"),
        "negative": (b"-1\n", "id -1"),
        "enormous": (b"9" * 30, "id 999999"),
        "more digits than Python reads": (b"9" * 5000, "does not hold token ids"),
        "too long": (b"5," * 128 + b"5\n", "the prompt has 129 tokens and the engine takes 1 to 128"),
    },
    "npy": {
        "empty": (b"", "does not hold token ids"),
        "text": (b"5,6\n", "does not hold token ids"),
        "truncated": (npy(np.arange(50))[:-9], "does not hold token ids"),
        "header only": (npy(np.arange(50))[:20], "does not hold token ids"),
        "zip": (npy(np.arange(4), np.savez), "does not hold token ids"),
        "objects": (npy(np.array([[1], [2, 3]], dtype=object)), "does not hold token ids"),
        "floats": (npy(np.ones(3)), "type float64"),
        "bool": (npy(np.ones(3, bool)), "type bool"),
        "strings": (npy(np.array(["5"])), "does not hold token ids"),
        "3 dimensions": (npy(np.ones((2, 2, 2), int)), "3 dimensions"),
        "0 dimensions": (npy(np.array(5)), "0 dimensions"),
        "no rows": (npy(np.zeros((0, 4), int)), "input_tokens"),
        "only padding": (npy(np.zeros((2, 4), int)), "holds no prompt"),
        "out of range": (npy(np.array([[5, 2**63]], np.uint64)), "id 9223372036854775808"),
        "negative": (npy(np.array([[5, -7]])), "id -7"),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, files in BAD_FILES.items() for name in files])
def test_bad_files_of_tokens(engine, tmp_path, capsys, kind, name):
    content, sentence = BAD_FILES[kind][name]
    (tmp_path / f"bad.{kind}").write_bytes(content)
    refused(run.main, scripts.run_flags(engine, tmp_path / f"bad.{kind}", tmp_path), sentence, capsys)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_edited_config_is_refused(engine, prompts, tmp_path, capsys):
    shutil.copytree(engine, tmp_path / "engine")
    path = tmp_path / "engine" / CONFIG_NAME
    values = json.loads(path.read_text())
    values["builder_config"]["max_output_len"] = 1000
    path.write_text(json.dumps(values))
    refused(run.main, scripts.run_flags(tmp_path / "engine", prompts, tmp_path), "was edited after the build", capsys)


# What goes wrong in the middle


def test_a_full_disk_leaves_the_old_engine(engine, prompts, tmp_path, capsys, monkeypatch):
    shutil.copytree(engine, tmp_path / "engine")
    before, original = snapshot(tmp_path / "engine"), torch_backend.write_tensors

    def full(path, plan, *more):
        if "rank1" in path.name:
            raise OSError(28, "No space left on device", str(path))
        original(path, plan, *more)

    monkeypatch.setattr(torch_backend, "write_tensors", full)
    given = scripts.build_flags(tmp_path / "engine", "v2_13b", "--world_size", "2")
    refused(build.main, given, "No space left on device; free space", capsys)
    assert snapshot(tmp_path / "engine") == before
    assert run.main(scripts.run_flags(tmp_path / "engine", prompts, tmp_path)) == 0


def test_a_full_disk_leaves_the_old_results(engine, prompts, tmp_path, capsys, monkeypatch):
    (tmp_path / "logits.npy").write_bytes(b"old")

    def full(write, _):
        write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_files, "write_array", full)
    refused(run.main, scripts.run_flags(engine, prompts, tmp_path), "No space left on device", capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.csv", "logits.npy", "prompts.csv"]
    assert (tmp_path / "logits.npy").read_bytes() == b"old"


def test_ctrl_c_during_the_imports(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr("baichuan.parallel.comm.world_of_this_process", stopped)
    refused(run.main, ["--max_output_len", "1"], "stopped by Ctrl-C", capsys)


def interrupted(command: list[str], ready, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """Exit code and standard error of a program that gets the signal, of Ctrl-C or another, once ready() holds."""
    process = subprocess.Popen(
        command, env=scripts.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.set_blocking(process.stdout.fileno(), False)
    deadline = time.monotonic() + 30
    while not ready(process) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(by)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, err.decode()


@pytest.mark.parametrize("parallel", [[], ["--parallel_build", "--world_size", "2"]], ids=["serial", "parallel"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_stopped_leaves_the_old_engine(engine, tmp_path, parallel, by):
    """The build is of 1.4 GB of dummy weights, of which a few MB are written; its processes end with it."""
    shutil.copytree(engine, tmp_path / "engine")
    before = snapshot(tmp_path / "engine")
    given = ["--model_version", "v1_7b", "--n_layer", "2", "--output_dir", str(tmp_path / "engine"), "--no_self_check"]

    def writing(_) -> bool:
        return any(path.stat().st_size > 1 << 20 for path in tmp_path.glob(".engine.building-*/*.engine"))

    code, err = interrupted(scripts.script("build.py", [*given, *parallel]), writing, by)  # reads what workers write
    if by == signal.SIGKILL:
        assert code == -signal.SIGKILL and list(tmp_path.glob(".engine.building-*"))
        with staged_folder(tmp_path / "engine"):  # as the next build's
            pass
    else:
        sentence = "stopped by Ctrl-C" if by == signal.SIGINT else "stopped by SIGTERM"
        assert code == 2 and sentence in scripts.sentences(err)[0] and "Traceback" not in err, err
    assert snapshot(tmp_path / "engine") == before and not list(tmp_path.glob(".engine.building-*"))


def test_ctrl_c_during_a_conversation(engine):
    command = scripts.script("run.py", text_flags(engine, "--chat"))
    code, err = interrupted(command, lambda process: b"lists the commands" in (process.stdout.read() or b""))
    assert code == 2 and "stopped by Ctrl-C" in scripts.sentences(err)[0] and "Traceback" not in err, err


def test_ctrl_c_during_a_generation_leaves_no_results(engine, prompts, tmp_path, capsys, monkeypatch):
    original, steps = ReferenceExecutor.forward, []

    def forward(self, step):
        steps.append(step)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(ReferenceExecutor, "forward", forward)
    refused(run.main, scripts.run_flags(engine, prompts, tmp_path), "stopped by Ctrl-C", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.csv"]
