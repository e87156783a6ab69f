"""build.py writes real plans, and run.py's own path runs the networks that they were built from, over stand-ins."""

import re

import goldens
import pytest
import torch
from demo_checkpoint import demo_checkpoint

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

from trt_standin import StandInContext, StandInEngine

import build
import hf_baichuan_convert
import run
from baichuan.config import SamplingConfig
from baichuan.engine import runtime
from baichuan.engine.folder import read_engine
from baichuan.executors.tensorrt import execute, plan_writer
from baichuan.executors.tensorrt.plan import Plan, check_interface
from baichuan.parallel.comm import run_ranks
from baichuan.text.settings import TEXT_FILES

SIZES = ["--max_input_len", "64", "--max_output_len", "24", "--max_batch_size", "2", "--max_beam_width", "3"]
QUESTIONS = ["世界上第二高的山峰是哪座？", "今天天气怎么样？"]


class Workflow:
    """Runs the scripts; remembers the networks of the plans that build.py wrote, and runs these in their place."""

    def __init__(self, monkeypatch, capsys, folder, checkpoint, version):
        self.capsys, self.folder, self.checkpoint, self.version = capsys, folder, str(checkpoint), version
        self.networks, self.contexts = {}, []
        lower = plan_writer.lower

        def remember(graph, config, quant, limits, weights, rank):
            contract, ops = lower(graph, config, quant, limits, weights, rank)
            self.networks[limits.world_size, rank] = graph, contract
            return contract, ops

        def open_plan(path, contract, comm, cache_path):
            graph, built = self.networks[comm.world_size, comm.rank]
            assert path.stat().st_size > 100_000 and built.inputs == contract.inputs
            engine = StandInEngine(graph.api, graph, contract)
            check_interface(engine, contract, graph.api, path)
            self.contexts.append(StandInContext(engine, comm))
            return Plan(graph.api, self.contexts[-1], torch.device("cpu"), None)

        monkeypatch.setattr(plan_writer, "lower", remember)
        monkeypatch.setattr(execute, "open_plan", open_plan)

    def build(self, backend, *flags, source=None):
        output = self.folder / backend
        source = source or ["--model_dir", self.checkpoint]
        flags = ["--model_version", self.version, *source, "--backend", backend, *SIZES, *flags]
        code = build.main([*flags, "--output_dir", str(output), "--no_self_check"])
        return code, self.capsys.readouterr().err

    def run(self, backend, *flags):
        flags = ["--engine_dir", str(self.folder / backend), "--max_output_len", "16", *flags]
        code = run.main([*flags, "--tokenizer_dir", self.checkpoint])
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    def texts(self, backend):
        """Greedy text, beams, sampling and a chat, as run.py prints them."""
        several = ["--input_text", *QUESTIONS, "--top_k", "1"]
        return [
            self.run(backend, *several),
            self.run(backend, "--num_beams", "3"),
            self.run(backend, "--random_seed", "3", "--temperature", "1.5"),
            self.run(backend, "--chat", "--input_text", QUESTIONS[0], "--top_k", "1", "--streaming"),
        ]


@pytest.fixture
def workflow(monkeypatch, capsys, tmp_path):
    return lambda checkpoint, version: Workflow(monkeypatch, capsys, tmp_path, checkpoint, version)


@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
def test_same_text_as_torch(workflow, version):
    """In float32, where both backends must agree to the last token: greedy, beams, sampling and chat."""
    work = workflow(goldens.checkpoint(version), version)
    for backend in ("torch", "tensorrt_rtx"):
        assert work.build(backend, "--dtype", "float32")[0] == 0
    assert work.texts("tensorrt_rtx") == work.texts("torch")
    profiles = {each.profile for context in work.contexts for each in context.runs}
    assert profiles == {"context", "generation"}


# The build commands of the README: the flags that follow --model_dir or --bin_model_dir.
PLUGINS = ["--use_gemm_plugin", "--use_gpt_attention_plugin"]
SMOOTH = ["--use_smooth_quant", "--use_gpt_attention_plugin", "float16"]
FROM_CHECKPOINT = {
    "fp16": ["--dtype", "float16", *PLUGINS],
    "bf16": ["--dtype", "bfloat16", *PLUGINS],
    "int8": ["--dtype", "float16", *PLUGINS, "--use_weight_only"],
    "int4": ["--dtype", "float16", *PLUGINS, "--use_weight_only", "--weight_only_precision", "int4"],
}
FROM_FOLDER = {
    "int8 kv": ["--dtype", "float16", *PLUGINS, "--int8_kv_cache", "--use_weight_only"],
    "smooth_quant": ["--use_smooth_quant", "--use_gpt_attention_plugin", "float16"],
    "smooth_quant per token and channel": [
        "--use_smooth_quant",
        *PLUGINS[1:],
        "float16",
        "--per_token",
        "--per_channel",
    ],
    "fp8": ["--dtype", "float16", "--enable_fp8", "--fp8_kv_cache"],
}


@pytest.fixture(scope="module")
def trained():
    return demo_checkpoint("v1_13b", 120)


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """What hf_baichuan_convert.py makes of it, for the KV cache and for SmoothQuant."""
    root, texts = tmp_path_factory.mktemp("folders"), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts.write_text("".join(f'{{"article": "{text}"}}\n' for text in QUESTIONS), "utf-8")
    for name, flags in {"kv": ["-kv"], "sq": ["-sq", "0.8"]}.items():
        flags = ["-i", str(trained), "-o", str(root / name), "-t", "fp16", *flags, "--calib_dataset", str(texts)]
        assert hf_baichuan_convert.main(flags) == 0
    return {name: ["--bin_model_dir", str(root / name / "1-gpu")] for name in ("kv", "sq")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FROM_CHECKPOINT, *FROM_FOLDER])
def test_readme_s_builds_say_what_torch_says(workflow, trained, folders, name):
    """The trained demo knows its answer by heart, so that rounding does not change it."""
    work = workflow(trained, "v1_13b")
    source = None if name in FROM_CHECKPOINT else folders["sq" if name.startswith("smooth") else "kv"]
    for backend in ("torch", "tensorrt_rtx"):
        assert work.build(backend, *(FROM_CHECKPOINT | FROM_FOLDER)[name], source=source)[0] == 0
    expected = work.run("torch", "--top_k", "1")
    assert work.run("tensorrt_rtx", "--top_k", "1") == expected
    assert "乔戈里峰" in expected


@pytest.mark.parametrize("quant", [[], ["--use_weight_only"]])
def test_two_ranks(workflow, quant):
    """Both plans of a world of two, opened and driven by the session's own code, on threads."""
    work = workflow(goldens.checkpoint("v1_7b"), "v1_7b")
    prompts = [[5, 17, 300, 42, 9], [7, 8]]
    found = {}
    for backend in ("torch", "tensorrt_rtx"):
        assert work.build(backend, "--dtype", "float32", "--world_size", "2", *quant)[0] == 0

        def generate(comm, folder=work.folder / backend):
            session = runtime.open_session(folder, comm)
            return [each.ids for each in session.generate(prompts, SamplingConfig(top_k=1), 12)]

        ranks = run_ranks(2, generate)
        assert ranks[0] == ranks[1]
        found[backend] = ranks[0]
    assert found["tensorrt_rtx"] == found["torch"]


def test_the_engine_folder(workflow):
    work = workflow(goldens.checkpoint("v2_13b"), "v2_13b")
    flags = ["--dtype", "float16", "--visualize", "--enable_debug_output", "--compute_capability", "8.9", "12.0"]
    code, errors = work.build("tensorrt_rtx", *flags)
    assert code == 0, errors
    engine = read_engine(work.folder / "tensorrt_rtx")
    assert engine.contract["module"] == "tensorrt_rtx" and engine.contract["targets"] == ["8.9", "12.0"]
    assert engine.contract["kv_mode"] == "in_place" and engine.contract["debug"]
    names = {path.name for path in engine.folder.iterdir()}
    plan = "baichuan_float16_tp1_rank0.engine"
    assert names == {"config.json", plan, plan.replace(".engine", ".svg"), *TEXT_FILES}
    assert engine.files[plan]["bytes"] == (engine.folder / plan).stat().st_size


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--backend", "tensorrt_rtx", "--compute_capability", "9.0"], "does not build for compute capability 9.0"),
        (["--backend", "tensorrt_rtx", "--remove_input_padding"], "TensorRT networks take padded batches"),
        (["--backend", "tensorrt_rtx", "--paged_kv_cache"], "a KV cache with a row for each sequence"),
        (["--backend", "tensorrt_rtx", "--use_inflight_batching"], "a KV cache with a row for each sequence"),
        (["--backend", "tensorrt_rtx", "--tokens_per_block", "64"], "a KV cache with a row for each sequence"),
        (["--backend", "tensorrt"], "tensorrt cannot be imported"),
        (["--backend", "torch", "--visualize"], "--visualize belongs to TensorRT"),
    ],
)
def test_bad_flags_are_one_sentence(capsys, tmp_path, flags, sentence):
    checkpoint = ["--model_dir", str(goldens.checkpoint("v1_7b")), "--model_version", "v1_7b"]
    code = build.main([*checkpoint, *flags, "--output_dir", str(tmp_path / "engine"), "--no_self_check"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and re.fullmatch(r"\S+: error: [^\n]*", last) and sentence in last


def test_without_a_gpu_run_says_so(monkeypatch, capsys, tmp_path):
    checkpoint = str(goldens.checkpoint("v1_7b"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--model_version", "v1_7b", "--model_dir", checkpoint, "--backend", "tensorrt_rtx", *SIZES]
    assert build.main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert "self-check skipped: a TensorRT plan runs on a GPU" in capsys.readouterr().err
    assert run.main(["--engine_dir", str(tmp_path), "--max_output_len", "4", "--tokenizer_dir", checkpoint]) == 2
    assert "error: a TensorRT plan runs on a GPU" in capsys.readouterr().err.strip().splitlines()[-1]
