"""The quantised commands of the workflow on a checkpoint of the original code: convert, build, run, one after another.

The checkpoint has random weights, so that only agreement with the float32 model is judged, and only roughly; accuracy
on a trained model is docs/accuracy.md.
"""

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from goldens import checkpoint
from safetensors.torch import load_file
from test_weight_only_ranks import reassembled

import build
import hf_baichuan_convert
import run
import weight
from baichuan.config import QuantConfig
from baichuan.engine.self_check import Agreement, all_logits
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.weights.hub.config_json import read_model_config

ROOT = Path(__file__).resolve().parents[1]
VERSION = "v2_13b"
ARTICLES = [
    "The quick brown fox jumps over the lazy dog, and 你好世界。",
    "Stocks rose on Monday after the central bank announced a cut in interest rates.",
    "A small town in the north celebrated its five hundredth anniversary with music.",
]


@dataclass
class Workflow:
    """Runs the scripts' main() as a user would."""

    folder: Path
    checkpoint: str

    def convert(self, *flags):
        texts = self.folder / "texts.jsonl"
        texts.write_text("\n".join(json.dumps({"article": text}) for text in ARTICLES))
        flags = ["-i", self.checkpoint, "-o", str(self.folder / "bin"), "--calib_dataset", str(texts), *flags]
        assert hf_baichuan_convert.main(flags) == 0

    def build(self, *flags):
        limits = ["--max_input_len", "32", "--max_output_len", "16", "--backend", "torch"]
        output = ["--output_dir", str(self.folder / "engine")]
        return build.main(["--model_version", VERSION, *limits, *output, *flags])

    def run(self):
        prompt, output = self.folder / "prompt.csv", self.folder / "out.csv"
        prompt.write_text("5,17,300,42,9\n")
        flags = ["--engine_dir", str(self.folder / "engine"), "--max_output_len", "6", "--top_k", "1"]
        assert run.main([*flags, "--input_tokens", str(prompt), "--output_csv", str(output)]) == 0
        return [[int(cell) for cell in row if cell] for row in csv.reader(output.read_text().splitlines())][0]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    return Workflow(tmp_path_factory.mktemp("workflow"), str(checkpoint(VERSION)))


@pytest.fixture(scope="module")
def kv_folder(workflow):
    workflow.convert("--calibrate-kv-cache", "-t", "fp16")
    saved = workflow.folder / "kv"
    (workflow.folder / "bin" / "1-gpu").rename(saved)
    return str(saved)


@pytest.fixture(scope="module")
def int4_folder(workflow):
    workflow.convert("--use_weight_only", "--weight_only_group_size", "32", "-t", "fp16")
    saved = workflow.folder / "int4"
    (workflow.folder / "bin" / "1-gpu").rename(saved)
    return str(saved)


@pytest.fixture(scope="module")
def smooth_folder(workflow):
    workflow.convert("-sq", "0.8", "--tensor-parallelism", "1", "--storage-type", "fp16")
    return str(workflow.folder / "bin" / "1-gpu")


def self_check_kl(messages):
    return float(re.search(r"mean KL (\S+) nats", messages)[1])


@pytest.mark.parametrize(
    "flags, bound",
    [
        # about twice what was measured on these random weights, where a logit's rank hangs on little
        (["--use_weight_only"], 0.03),
        (["--use_weight_only", "--weight_only_precision", "int8", "--quantize_lm_head"], 0.03),
        (["--use_weight_only", "--weight_only_precision", "int4", "--weight_only_group_size", "32"], 1.0),
        (["--enable_fp8", "--per_token", "--per_channel"], 0.5),
    ],
)
def test_weight_only_from_the_checkpoint(workflow, capsys, flags, bound):
    assert workflow.build("--model_dir", workflow.checkpoint, *flags) == 0
    assert self_check_kl(capsys.readouterr().err) < bound
    assert workflow.run()[:5] == [5, 17, 300, 42, 9]


@pytest.mark.parametrize(
    "flags, bound",
    [
        (["--int8_kv_cache"], 0.02),
        (["--int8_kv_cache", "--use_weight_only"], 0.04),
        ([], 0.001),
        (["--enable_fp8", "--fp8_kv_cache"], 0.5),
        (["--enable_fp8", "--per_channel"], 0.5),
        (["--enable_fp8", "--per_token", "--int8_kv_cache"], 0.5),
    ],
)
def test_from_a_folder_with_kv_scales(workflow, kv_folder, capsys, flags, bound):
    assert workflow.build("--bin_model_dir", kv_folder, "--dtype", "float16", *flags) == 0
    assert self_check_kl(capsys.readouterr().err) < bound
    assert workflow.run()[:5] == [5, 17, 300, 42, 9]


def test_each_linear_s_own_strength(workflow, capsys):
    workflow.convert("-sq", "auto", "-t", "fp16")
    saved = workflow.folder / "auto"
    (workflow.folder / "bin" / "1-gpu").rename(saved)
    flags = ["--bin_model_dir", str(saved), "--use_smooth_quant"]
    for mode, bound in (["--per_token", "--per_channel"], 0.1), ([], 0.5):  # as with one strength for all, below
        assert workflow.build(*flags, *mode) == 0
        assert self_check_kl(capsys.readouterr().err) < bound
    assert workflow.build("--bin_model_dir", str(saved), "--use_weight_only") == 0, "the weights are as they were"
    assert self_check_kl(capsys.readouterr().err) < 0.03
    with pytest.raises(SystemExit):
        workflow.convert("-sq", "automatic")
    assert "automatic is neither a number nor auto; give 0 to 1, or auto" in capsys.readouterr().err


def test_integers_that_calibration_found(workflow, int4_folder, capsys):
    int4 = ["--use_weight_only", "--weight_only_precision", "int4"]
    assert workflow.build("--bin_model_dir", int4_folder, *int4, "--int8_kv_cache") == 0
    said = capsys.readouterr().err
    assert "the INT4 weights are those that the calibration found" in said
    assert self_check_kl(said) < 1.0
    assert workflow.run()[:5] == [5, 17, 300, 42, 9]
    assert workflow.build("--bin_model_dir", int4_folder, *int4, "--weight_only_group_size", "64") == 2
    assert "holds int4 weights in groups of 32 and 64 is asked for" in capsys.readouterr().err
    assert workflow.build("--bin_model_dir", int4_folder) == 0
    assert "was calibrated for INT4 weights and the engine is not quantised" in capsys.readouterr().err


def test_integers_by_awq(workflow, capsys):
    workflow.convert("--use_weight_only", "--weight_only_method", "awq", "--weight_only_group_size", "32", "-t", "fp16")
    saved = workflow.folder / "awq"
    (workflow.folder / "bin" / "1-gpu").rename(saved)
    capsys.readouterr()
    for flags, bound in (
        (["--use_weight_only", "--weight_only_precision", "int4"], 1.0),
        (["--int8_kv_cache"], 0.02),  # in floats the folded model is the model, and its cache's scales are its own
    ):
        assert workflow.build("--bin_model_dir", str(saved), *flags) == 0
        said = capsys.readouterr().err
        assert self_check_kl(said) < bound
        assert ("the INT4 weights are those that the calibration found" in said) == ("int4" in flags)
        assert workflow.run()[:5] == [5, 17, 300, 42, 9]


@pytest.mark.parametrize(
    "flags, bound",
    [
        ([], 0.5),
        (["--per-token"], 0.3),
        (["--per_channel"], 0.3),
        (["--per-token", "--per-channel"], 0.1),
        (["--per_token", "--per_channel", "--int8_kv_cache"], 0.1),
    ],
)
def test_smooth_quant(workflow, smooth_folder, capsys, flags, bound):
    assert workflow.build("--bin_model_dir", smooth_folder, "--use_smooth_quant", *flags) == 0
    messages = capsys.readouterr().err
    assert self_check_kl(messages) < bound
    assert ("far less accurate" in messages) == (len(flags) < 2), "a scale a tensor: a warning says what is lost"
    assert workflow.run()[:5] == [5, 17, 300, 42, 9]


def test_fp8_scales_beside_a_checkpoint(workflow, kv_folder, capsys):
    scales = f"{kv_folder}/fp8_scales.npz"
    flags = ["--model_dir", workflow.checkpoint, "--enable_fp8", "--quantized_fp8_model_path", scales]
    assert workflow.build(*flags) == 0
    assert self_check_kl(capsys.readouterr().err) < 0.5


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "none of -kv, -sq and --use_weight_only was given"),
        (["-kv", "--weight_only_method", "awq"], "--weight_only_method needs --use_weight_only; add it"),
        (
            ["--use_weight_only", "--weight_only_precision", "int8", "--weight_only_method", "awq"],
            "--weight_only_method awq finds INT4 weights and INT8 is asked for; use gptq",
        ),
        (["-sq", "1.5"], "alpha 1.5 is outside"),
        (["-sq", "nan"], "alpha nan is outside"),
        (["-kv", "-tp", "3"], "num_heads 10 is not divisible by tp_size 3"),
        (["-kv", "-tp", "0"], "tensor parallelism 0 is out of range"),
        (["-kv", "-p", "0"], "processes 0 is out of range"),
        (["-kv", "--calib_size", "0"], "calib_size 0 is out of range"),
        (["-kv", "--calib_dataset", "missing.json"], "--calib_dataset missing.json does not exist"),
        (["-kv", "--model_version", "v1_7b"], "contradicts model_version v1_7b"),
        (["-kv", "-i", "nowhere"], "nowhere is neither a folder nor a hub id"),
    ],
)
def test_wrong_flags_of_the_conversion(workflow, tmp_path, capsys, flags, message):
    flags = ["-i", workflow.checkpoint, "-o", str(tmp_path), "--calib_dataset", str(tmp_path / "t.txt"), *flags]
    flags += ["--log_level", "error"]
    (tmp_path / "t.txt").write_text("one text\n")
    assert hf_baichuan_convert.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_processes_from_a_checkpoint_to_text(tmp_path, method):
    """Convert, build and run as processes; two ranks get the integers that one gets."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"article": text}) for text in ARTICLES))
    source = ["-i", checkpoint(VERSION), "-o", tmp_path / "bin", "--calib_dataset", tmp_path / "texts.jsonl"]
    int4 = ["--use_weight_only", "--weight_only_precision", "int4", "--weight_only_group_size", "0"]

    def python(script, *flags):
        command = [sys.executable, ROOT / f"{script}.py", *flags]
        return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout

    ranks = {}
    for tp_size in (1, 2):
        python("hf_baichuan_convert", *source, *int4, "--weight_only_method", method, "-tp", tp_size, "-t", "fp16")
        engine = tmp_path / f"engine{tp_size}"
        folder = ["--bin_model_dir", tmp_path / f"bin/{tp_size}-gpu", "--output_dir", engine]
        python("build", *folder, *int4, "--max_input_len", 32, "--world_size", tp_size, "--backend", "torch")
        files = [f"baichuan_float16_tp{tp_size}_rank{rank}.engine" for rank in range(tp_size)]
        ranks[tp_size] = [load_file(engine / file) for file in files]
    fields = [name for name in ranks[1][0] if name.endswith((".packed", ".scale", ".zero"))]
    assert len(fields) > 8
    for field in fields:
        name, _, kind = field.rpartition(".")
        assert torch.equal(reassembled(ranks[2], name, kind, False), ranks[1][0][field]), field
    said = python(
        "run", "--engine_dir", tmp_path / "engine1", "--input_text", "fox", "--max_output_len", 4, "--top_k", 1
    )
    assert "fox" in said


def test_a_float_engine_differs_from_an_int4_one(workflow):
    """The negative control of the bounds above: the engines really are quantised."""

    model = read_model_config(Path(workflow.checkpoint), VERSION, "float32")
    source = weight.WeightSource(Path(workflow.checkpoint))
    ids = torch.randint(1000, (40,), generator=torch.Generator().manual_seed(0)).tolist()

    def logits(quant):
        return all_logits(ReferenceExecutor(model, quant, weight.load_rank(source, model, quant)), ids)

    exact = logits(QuantConfig())
    kls = [Agreement.of(exact, logits(QuantConfig(w, g))).kl for w, g in (("int8", 0), ("int4", 32), ("int4", 0))]
    assert 1e-5 < kls[0] < 0.05 < kls[1] < kls[2]
