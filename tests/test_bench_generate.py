"""The generation benchmark's lines, ranks and JSON, with the reference executor in the GPU's place."""

import json
from dataclasses import replace

import pytest
import torch

from baichuan.config import ModelConfig
from baichuan.errors import ConfigError
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.parallel.comm import Solo, run_ranks
from benchmarks import bench_generate
from benchmarks.random_weights import RandomWeights

TINY = ModelConfig("v1_7b", 64, 2, 4, 96, 50)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Each executor that was made, as (rank, tp_size)."""
    made = []

    def executor(model, quant, weights, comm, switches):
        made.append((comm.rank, comm.world_size))
        return ReferenceExecutor(model, quant, weights, comm)

    monkeypatch.setattr(bench_generate, "PRESETS", {"v1_7b": TINY, "v2_13b": replace(TINY, model_version="v2_13b")})
    monkeypatch.setattr(bench_generate, "CudaExecutor", executor)
    monkeypatch.setattr(bench_generate, "Nccl", lambda host, device: host)
    monkeypatch.setattr(bench_generate, "gpu_of_rank", lambda host: torch.device("cpu"))
    monkeypatch.setattr(bench_generate, "require_gpu", lambda *_: None)
    monkeypatch.setattr(bench_generate, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return made


def arguments(monkeypatch, *flags):
    """What main() would hand to bench()."""
    given = []
    monkeypatch.setattr(bench_generate, "run_script", lambda parser, argv, _: given.append(parser.parse_args(argv)))
    bench_generate.main(["--input_len", "5", "--output_len", "4", "--runs", "1", *map(str, flags)])
    return given[0]


def test_one_gpu(monkeypatch, tmp_path, capsys, on_the_cpu):
    flags = ["--precision", "float16", "int4", "--batch_size", 1, 3, "--model_version", "v2_13b"]
    args = arguments(monkeypatch, *flags, "--json", tmp_path / "results.json")
    assert bench_generate.bench(args, Solo()) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[:4] for line in lines] == [
        ["v2_13b", precision, batch, "1"] for precision in ("float16", "int4") for batch in ("1", "3")
    ]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(each["precision"], each["batch_size"]) for each in results] == [
        (precision, batch) for precision in ("float16", "int4") for batch in (1, 3)
    ]
    parameters = 2 * (4 * 64**2 + 3 * 64 * 96) + 50 * 64
    cached = 2 * 2 * 64 * (5 + 2)  # k and v of 2 layers at the middle of the output
    assert results[0]["limit_ms"] == pytest.approx(1e3 * 2 * (parameters + cached) / 1e9)
    assert on_the_cpu == [(0, 1), (0, 1)]


def test_a_run_that_fails_keeps_what_it_measured(monkeypatch, tmp_path, on_the_cpu):
    measure = bench_generate.measure_model

    def measure_float16(args, version, precision, *rest):
        if precision != "float16":
            raise RuntimeError("out of memory")
        measure(args, version, precision, *rest)

    monkeypatch.setattr(bench_generate, "measure_model", measure_float16)
    args = arguments(monkeypatch, "--precision", "float16", "int4", "--json", tmp_path / "results.json")
    with pytest.raises(RuntimeError):
        bench_generate.bench(args, Solo())
    (kept,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert kept["precision"] == "float16"


def test_two_gpus_beside_one(monkeypatch, capsys, on_the_cpu):
    args = arguments(monkeypatch, "--tp", 1, 2)
    assert run_ranks(2, lambda comm: bench_generate.bench(args, comm)) == [0, 0]
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[3] for line in lines] == ["1", "2"]
    ones, both = (float(line.split("|")[2].split()[0]) for line in lines)
    assert lines[0].endswith("| ")
    assert float(lines[1].split("|")[-1].split()[0]) == pytest.approx(both / ones, rel=0.02, abs=0.01)
    assert sorted(on_the_cpu) == [(0, 1), (0, 2), (1, 2)], "the second rank waits while the first measures alone"


def test_another_number_of_gpus_is_refused(monkeypatch, on_the_cpu):
    with pytest.raises(ConfigError, match="mpirun -n 4"):
        bench_generate.bench(arguments(monkeypatch, "--tp", 1, 4), Solo())


def test_ranks_share_what_is_not_cut_and_nothing_else():
    model, quant = TINY, bench_generate.PRECISIONS["float16"]
    first, second = (RandomWeights(model, quant, "cpu").rank(2, rank) for rank in (0, 1))
    assert torch.equal(first.embedding, second.embedding)
    assert torch.equal(first.layers[1].post_norm, second.layers[1].post_norm)
    assert not torch.equal(first.layers[1].qkv.weight, second.layers[1].qkv.weight)
    assert first.layers[0].down_proj.weight.shape == (64, 48)
