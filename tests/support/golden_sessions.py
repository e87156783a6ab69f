"""Sessions on the reference executor over the golden checkpoints, one rank or several as threads."""

from __future__ import annotations

from dataclasses import replace

import goldens

import weight
from baichuan.config import BuildConfig, ModelConfig, QuantConfig, SamplingConfig
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.generation.requests import Serving
from baichuan.generation.session import Session
from baichuan.parallel.comm import Communicator, Solo, run_ranks
from baichuan.records import ModelWeights
from baichuan.weights.hub.config_json import read_model_config

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)  # the goldens never stop
LIMITS = BuildConfig(max_batch_size=8, max_beam_width=4)


def model(version: str, dtype: str = "float32") -> ModelConfig:
    return read_model_config(goldens.checkpoint(version), version, dtype)


def weights(version: str, dtype: str = "float32", rank: int = 0, tp_size: int = 1) -> ModelWeights:
    source = weight.WeightSource(goldens.checkpoint(version))
    return weight.load_rank(source, model(version, dtype), QuantConfig(), rank, tp_size)


def session(
    version: str, dtype: str = "float32", comm: Communicator | None = None, kind=ReferenceExecutor, **limits
) -> Session:
    comm = comm or Solo()
    loaded = weights(version, dtype, comm.rank, comm.world_size)
    executor = kind(model(version, dtype), QuantConfig(), loaded, comm)
    return Session(executor, model(version, dtype), replace(LIMITS, **limits))


def run(serving: Serving, steps: int = 10_000) -> tuple[dict, dict]:
    """ids and last progress of each request, by key, after so many steps or when all have ended."""
    ids: dict = {}
    last: dict = {}
    while serving.unfinished and steps:
        steps -= 1
        for progress in serving.step():
            assert progress.key not in last
            ids.setdefault(progress.key, []).extend(progress.new_ids)
            if progress.finished:
                last[progress.key] = progress
    return ids, last


def on_ranks(version: str, dtype: str, tp_size: int, body, kind=ReferenceExecutor):
    """body(session) of rank 0 when tp_size ranks run it together, on this kind of executor."""
    return run_ranks(tp_size, lambda comm: body(session(version, dtype, comm, kind)))[0]
