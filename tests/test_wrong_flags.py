"""Every flag's wrong values, in build.py and in run.py: one sentence each, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import scripts
from scripts import refused
from tiny_engine import snapshot

import build
import run

VERSION = "v1_7b"


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
        (scripts.text_flags(Path(), VERSION, "--input_text", "word " * 200), "and the engine takes 1 to 128"),
        (scripts.text_flags(Path(), VERSION, "--input_text", "a", "b", "--streaming"), "--streaming prints one text"),
        (scripts.text_flags(Path(), VERSION, "--input_text", "a\udcff"), "not valid UTF-8"),
        (scripts.text_flags(Path(), VERSION, "--chat", "--output_csv", "x"), "a conversation writes no files"),
    ],
    ids=range(6),
)
def test_wrong_text(engine, capsys, more, sentence):
    refused(run.main, [*more, "--engine_dir", str(engine)], sentence, capsys)
