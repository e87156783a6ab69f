"""Requests in flight through captured steps without a GPU: Triton's interpreter, and graphs that compute again.

Stands beside tests/test_cuda.py, which captures for real: here it is the padding, the choice of a graph and what is
loaded into it that are tested.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_device import DEVICE

from baichuan.config import BuildConfig, ModelConfig, QuantConfig, SamplingConfig
from baichuan.executors.cuda import executor as cuda_executor
from baichuan.executors.cuda import graph
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.graph import PATIENCE, Captured, Size, StepGraphs
from baichuan.executors.kv_cache import PoolSettings
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.generation.requests import Request
from baichuan.records import Step
from benchmarks.random_weights import RandomWeights

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/test_cuda.py captures for real")

MODEL = ModelConfig("v1_7b", 64, 1, 2, 64, 64, dtype="float32")
LENGTHS = (12, 3, 17)
GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
DRAWN = replace(GREEDY, top_k=20, top_p=0.9, temperature=1.0)


@pytest.fixture
def replays(monkeypatch):
    """The sizes of the graphs that were replayed, in order."""
    sizes = []

    def capture(self, run, pool, out):
        logits = run(self.static).clone()
        self.logits = logits if out is None else out.copy_(logits)

        def replay():
            sizes.append(self.size)
            self.logits.copy_(run(self.static))

        self.graph = SimpleNamespace(replay=replay)

    monkeypatch.setattr(Captured, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda_executor, "spare_device_memory", lambda device: 0)
    return sizes


def requests():
    generator = torch.Generator().manual_seed(1)
    for key, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(3, 60, (length,), generator=generator).tolist())
        yield Request(key, ids, GREEDY if key % 2 else replace(DRAWN, random_seed=key), 5 - key)


def serve(executor, arriving):
    """Ids by request; one arrives every second step."""
    engine = InFlight(executor, MODEL, BuildConfig(max_batch_size=3, max_input_len=30, max_output_len=8), Policy(8))
    ids, arriving, step = {}, list(arriving), 0
    while arriving or engine.unfinished:
        if arriving and step % 2 == 0:
            engine.add(arriving.pop(0))
        for progress in engine.step():
            ids.setdefault(progress.key, []).extend(progress.new_ids)
        step += 1
    return ids


@pytest.fixture
def weights():
    return RandomWeights(MODEL, QuantConfig(), DEVICE, 0).rank()


def test_requests_in_captured_steps_are_what_they_are_alone(weights, replays):
    captured, eager = (CudaExecutor(MODEL, QuantConfig(), weights, pool=PoolSettings(16)) for _ in range(2))
    eager.captures = False
    alone = {each.key: serve(eager, [each])[each.key] for each in requests()}
    assert not replays
    assert serve(captured, requests()) == alone
    assert any(size.mixed for size in replays) and any(not size.prompts for size in replays)


def last_tokens(step):
    """[outputs, 1]: what stands for logits"""
    return step.tokens[step.output_rows][:, None].float()


def mixed_step(singles, prompt):
    """Tokens 1, 2, 3 ...: one each of `singles` sequences and `prompt` of another."""
    ids = list(range(1, singles + prompt + 1))
    return Step.of([[token] for token in ids[:singles]] + [ids[singles:]], [5] * singles + [0], device="cpu")


def test_a_new_size_runs_in_a_larger_graph_until_it_has_come_often(replays, monkeypatch):
    graphs, ran = StepGraphs(), []

    def run(step):
        ran.append(step)
        return last_tokens(step)

    def forward(singles, prompt):
        expected = [*range(1, singles + 1), singles + prompt]
        step = mixed_step(singles, prompt)
        assert graphs(run, step)[:, 0].tolist() == expected
        return replays[-1] if replays else None

    assert forward(5, 90) is None and forward(5, 90) is None, "run as it is, then captured"
    assert forward(5, 90) == Size(96, 16, 4)
    eager = len(ran)
    assert [forward(4, 50) for _ in range(PATIENCE)] == [Size(96, 16, 4)] * PATIENCE
    assert len(ran) - eager == PATIENCE, "replays alone, which the double runs, too"
    forward(4, 50)
    assert forward(4, 50) == Size(64, 16, 4)
    monkeypatch.setattr(graph, "MOST_PADDING", 0)
    assert forward(4, 80) == Size(96, 16, 4), "a graph of its size, with padding inside of it"
    replays.clear()
    assert forward(14, 30) is None, "more single tokens than any graph has room for"
    assert forward(4, 20) is None, "the control: nothing is a little larger now"


def test_a_graph_that_keeps_its_first_tokens_is_noticed(weights, replays, monkeypatch):
    captured, eager = (CudaExecutor(MODEL, QuantConfig(), weights, pool=PoolSettings(16)) for _ in range(2))
    eager.captures = False
    expected = serve(eager, requests())
    load = Captured.load

    def keep_tokens(self, step):
        before = self.tokens.clone()
        load(self, step)
        if hasattr(self, "graph") and self.size.mixed:
            self.tokens.copy_(before)

    monkeypatch.setattr(Captured, "load", keep_tokens)
    assert serve(captured, requests()) != expected
