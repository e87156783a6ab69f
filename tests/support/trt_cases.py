"""What the TensorRT tests run: small models of every version, quantised by the project's own conversion, and a course
of steps that has a padded prefill, a chunk, decoding, and sequences that branch, move and leave."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from binary_models import make_checkpoint, make_samples
from torch import Tensor
from trt_standin import Network

import weight
from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.config import VERSIONS, BuildConfig, ModelConfig, QuantConfig
from baichuan.executors.base import Executor, PagedCache, RowCache
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.kv_cache import KVCache
from baichuan.parallel.comm import Communicator, run_ranks
from baichuan.records import Int4Weight, ModelWeights, Step
from baichuan.weights.shard import LINEARS

# Ten heads have slopes of two powers of two, and five a rank; 51 ids have to be padded for two ranks; the sizes divide
# by INT4's groups.
SIZES = dict(hidden_size=320, num_layers=2, num_heads=10, intermediate_size=192, vocab_size=51)
LIMITS = dict(backend="tensorrt_rtx", max_batch_size=3, max_beam_width=2, max_input_len=24, max_output_len=16)

SMOOTH = {
    f"smooth_quant{'-per_token' * token}{'-per_channel' * channel}": QuantConfig(
        "smooth_quant", per_token=token, per_channel=channel
    )
    for token in (False, True)
    for channel in (False, True)
}
QUANTS = {
    "none": QuantConfig(),
    "int8": QuantConfig("int8"),
    "int8-lm_head": QuantConfig("int8", quantize_lm_head=True),
    "int4": QuantConfig("int4"),
    "int4-g32-lm_head": QuantConfig("int4", group_size=32, quantize_lm_head=True),
    **SMOOTH,
    "fp8": QuantConfig("fp8"),
    "fp8-per_token-per_channel": QuantConfig("fp8", per_token=True, per_channel=True),
    "kv_int8": QuantConfig(kv_cache="int8"),
    "kv_fp8": QuantConfig(kv_cache="fp8"),
    "int8-kv_int8": QuantConfig("int8", kv_cache="int8"),
    "smooth_quant-kv_int8": replace(SMOOTH["smooth_quant-per_token-per_channel"], kv_cache="int8"),
    "fp8-kv_fp8": QuantConfig("fp8", kv_cache="fp8"),
    "int4-g32-zeros": QuantConfig("int4", group_size=32, zero_points=True),
}


def model(version: str, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(version, dtype=dtype, **SIZES)


def limits(tp_size: int = 1, **changes) -> BuildConfig:
    return BuildConfig(world_size=tp_size, **{**LIMITS, **changes})


@cache
def _folder(version: str, tp_size: int, smooth: bool) -> Path:
    root = tempfile.mkdtemp(prefix="trt-cases-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = model(version)
    request = ConvertRequest(
        Path(root), config, partial(make_checkpoint, config), tp_size, processes=1, alpha=0.5 if smooth else None
    )
    return convert(request, make_samples(config), {})


@cache
def weights(config: ModelConfig, quant: QuantConfig, rank: int = 0, tp_size: int = 1) -> ModelWeights:
    """One rank's weights, by way of the binary folder."""
    folder = _folder(config.model_version, tp_size, quant.weights == "smooth_quant")
    loaded = weight.load_rank(weight.WeightSource(binary_folder=folder), config, quant, rank, tp_size)
    if not quant.zero_points:
        return loaded
    layers = (
        replace(layer, **{name: _with_zeros(getattr(layer, name)) for name in LINEARS}) for layer in loaded.layers
    )
    return replace(loaded, layers=tuple(layers))


def _with_zeros(matrix: Int4Weight) -> Int4Weight:
    """The same integers and scales with zeros from -2 to 2."""
    zero = (torch.arange(matrix.scale.numel()) % 5 - 2).to(torch.int8)
    return replace(matrix, zero=zero.view(matrix.scale.shape))


def network(version: str = "v2_7b", quant: QuantConfig | None = None, **changes) -> Network:
    """A small model's network, for one rank."""
    config, quant = model(version), quant or QuantConfig()
    return Network(config, quant, limits(**changes), weights(config, quant))


def course(executor: Executor, vocab_size: int) -> dict[str, Tensor]:
    """Logits of every kind of step, by its name."""
    ids = torch.randint(vocab_size, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = {}

    def forward(name: str, step: Step) -> Step:
        logits[name] = executor.forward(step).clone()
        return step

    def some(count: int) -> list[int]:
        taken = ids[:count]
        del ids[:count]
        return taken

    executor.reset(5, 40)
    forward("prefill, every output", Step.of([some(9), some(2), some(5)], all_outputs=True))
    forward("chunk", Step.of([some(3), some(7), some(1)], [9, 2, 5]))
    step = forward("chunk, one row", Step.of([some(1), some(1), some(6)], [12, 9, 6]))
    step = forward("decode", step.next(torch.tensor(some(3))))
    parents = torch.tensor([0, 0, 2, 1, 1])
    reorder(executor.cache, parents)
    step = forward("decode after branching", step.next(torch.tensor(some(5)), parents))
    parents = torch.tensor([4, 2])
    reorder(executor.cache, parents)
    step = forward("decode after leaving", step.next(torch.tensor(some(2)), parents))
    step = forward("decode again", step.next(torch.tensor(some(2))))
    lengths = step.context_lengths.tolist()
    forward("a last chunk", Step.of([some(36 - lengths[0]), some(2)], lengths, all_outputs=True))
    executor.reset(1, 30)
    forward("a new request", Step.of([some(24)]))
    if not isinstance(executor.cache, KVCache):  # a paged cache sees what the step's lengths say
        executor.cache.truncate(0, 20)
    forward("other tokens than before", Step.of([some(4)], [20], all_outputs=True))
    return logits


def reorder(cache: RowCache | PagedCache, parents: Tensor) -> None:
    """Row b becomes what row parents[b] was.  The rows of a paged cache have blocks of their own here."""
    if not isinstance(cache, KVCache):
        cache.reorder(parents)
        return
    for layer in cache.layers:
        for kept in (layer.k, layer.v):
            kept[layer.tables[: len(parents)].long()] = kept[layer.tables[parents].long()]


def both(config: ModelConfig, quant: QuantConfig, tp_size: int = 1, **changes) -> tuple[dict, dict]:
    """The course on the reference executor and on the network, of the same weights."""
    build = limits(tp_size, **changes)

    def reference(comm: Communicator) -> dict[str, Tensor]:
        executor = ReferenceExecutor(config, quant, weights(config, quant, comm.rank, tp_size), comm)
        return course(executor, config.vocab_size)

    networks = [Network(config, quant, build, weights(config, quant, rank, tp_size), rank) for rank in range(tp_size)]

    def course_of_rank(comm: Communicator) -> dict[str, Tensor]:
        return course(networks[comm.rank].executor(comm), config.vocab_size)

    ranks = run_ranks(tp_size, course_of_rank)
    assert all(torch.equal(ranks[0][name], each[name]) for each in ranks for name in each), "ranks differ"
    return run_ranks(tp_size, reference)[0], ranks[0]


def distance(reference: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """The largest and the root mean square difference of a logit, relative to the logits' standard deviation."""
    expected, found = (torch.cat([each[name].flatten() for name in reference]) for each in (reference, other))
    difference = (expected - found) / expected.std()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


ALL_VERSIONS = tuple(VERSIONS)
