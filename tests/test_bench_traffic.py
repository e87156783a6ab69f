"""The traffic benchmark's lengths, lines and figures, with the reference executor in the GPU's place."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from baichuan.config import ModelConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.parallel.comm import Solo, run_ranks
from benchmarks import bench_planning, bench_traffic
from benchmarks.traffic import lognormal

TINY = ModelConfig("v1_7b", 64, 2, 4, 96, 50)


@pytest.fixture
def on_the_cpu(monkeypatch):
    def executor(model, quant, weights, comm, switches):
        return ReferenceExecutor(model, quant, weights, comm)

    monkeypatch.setattr(bench_traffic, "PRESETS", {"v1_7b": TINY, "v2_13b": replace(TINY, model_version="v2_13b")})
    monkeypatch.setattr(bench_traffic, "CudaExecutor", executor)
    monkeypatch.setattr(bench_traffic, "require_gpu", lambda *_: None)
    monkeypatch.setattr(bench_traffic, "join_gpus", lambda comm: (torch.device("cpu"), comm))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def arguments(monkeypatch, *flags):
    """What main() would hand to bench()."""
    given = []
    monkeypatch.setattr(bench_traffic, "run_script", lambda parser, argv, _: given.append(parser.parse_args(argv)))
    bench_traffic.main([*map(str, flags)])
    return given[0]


def test_lengths_have_the_mean_and_the_longest_and_a_seed():
    lengths = [lognormal(np.random.default_rng(seed), 1000, 220, 1024) for seed in (0, 0, 1)]
    assert lengths[0] == lengths[1] != lengths[2]
    for each in lengths:
        assert np.mean(each) == pytest.approx(220, abs=1) and max(each) == 1024 and min(each) >= 1
        assert 100 < np.median(each) < 160, "skewed, as lengths of a chat are"


def test_a_run(monkeypatch, tmp_path, capsys, on_the_cpu):
    flags = ["--rows", 4, "--requests", 12, "--arrivals", 6, "--shares", 0.5, "--static_batches", 2]
    flags += ["--mean_input", 9, "--mean_output", 7, "--longest", 40, "--json", tmp_path / "out.json"]
    assert bench_traffic.bench(arguments(monkeypatch, *flags), Solo()) == 0
    out = capsys.readouterr().out
    values = json.loads((tmp_path / "out.json").read_text())
    at_once, poisson = values["results"]
    assert (at_once["name"], at_once["requests"], poisson["requests"]) == ("all at once", 12, 6)
    assert poisson["name"].startswith("50%, ") and "static batches: " in out and "a shared prefix" in out
    assert at_once["full_tokens_per_s"] > 0
    for each in values["results"]:
        assert 0 < each["first_token_ms"][0] <= each["first_token_ms"][2] and each["tokens_per_s"] > 0
        assert 0 < each["cache_share"] <= 1 and 0 < each["planning_share"] < 1
        assert each["between_tokens_ms"][0] <= each["between_tokens_ms"][2]


def test_two_ranks_serve_together(monkeypatch, tmp_path, capsys, on_the_cpu):
    """Rank 0 measures; the other computes its share of the same steps, or neither would end."""
    flags = ["--rows", 3, "--requests", 5, "--arrivals", 0, "--static_batches", 0, "--mean_input", 9]
    flags += ["--mean_output", 4, "--longest", 20, "--json", tmp_path / "out.json"]
    args = arguments(monkeypatch, *flags)
    assert run_ranks(2, lambda comm: bench_traffic.bench(args, comm)) == [0, 0]
    values = json.loads((tmp_path / "out.json").read_text())
    assert (values["tp_size"], values["results"][0]["requests"]) == (2, 5)
    assert capsys.readouterr().out.count("all at once") == 1


def test_planning_without_a_gpu(capsys):
    flags = ["--rows", "20", "--requests", "60", "--mean_input", "9", "--mean_output", "7", "--longest", "40"]
    assert bench_planning.main([*flags, "--chunk_tokens", "64"]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("20 rows, 60 requests, chunks of 64 tokens, ")
    assert [line[:16].rstrip() for line in lines] == ["decode alone", "beside prompts"]
    for line in lines:
        scheduling, host = (list(map(float, part.split())) for part in line.split("|")[1:])
        assert 0 < scheduling[0] <= scheduling[2] and scheduling[0] < host[0] <= host[2]
