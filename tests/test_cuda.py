"""The CUDA executor on a GPU: the original code's numbers, graphs, and that every run is the same run."""

from dataclasses import replace

import goldens
import pytest
import torch
from kernel_device import DEVICE, relative_error, to_device

import weight
from baichuan.config import BuildConfig, ModelConfig, QuantConfig, SamplingConfig
from baichuan.errors import UnsupportedError
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.graph import padded_batch_size, padded_prefill
from baichuan.executors.cuda.ops import Switches
from baichuan.executors.kv_cache import PoolSettings
from baichuan.generation.in_flight import InFlight, Policy
from baichuan.generation.requests import Request
from baichuan.generation.session import Session
from baichuan.records import Step
from baichuan.weights.hub.config_json import read_model_config
from benchmarks.random_weights import RandomWeights

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")]

GREEDY = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=-1)
SMALL = ModelConfig("v1_7b", 256, 3, 2, 512, 400)
MAX_ERROR = {"float32": 2e-4, "float16": 0.1, "bfloat16": 0.6}  # on logits of deviation 3: the goldens' README


def executor(model=SMALL, quant=None, switches=None, seed=0) -> CudaExecutor:
    quant = quant or QuantConfig()
    return CudaExecutor(model, quant, RandomWeights(model, quant, DEVICE, seed).rank(), switches=switches)


@pytest.mark.parametrize("dtype", MAX_ERROR)
@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
@pytest.mark.parametrize("own", [True, False], ids=["our kernels", "PyTorch's"])
def test_logits_and_tokens_of_the_original_code(version, dtype, own):
    if version == "v2_13b" and dtype == "float16":
        pytest.skip("the goldens of the 13B model were made in bfloat16")
    checkpoint, golden = goldens.checkpoint(version), goldens.golden(version)
    model = read_model_config(checkpoint, version, dtype)
    weights = to_device(weight.load_rank(weight.WeightSource(checkpoint), model, QuantConfig()))
    cuda = CudaExecutor(model, QuantConfig(), weights, switches=Switches(own, own))
    session = Session(cuda, model, BuildConfig(max_batch_size=4))
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    for length, logits in zip(goldens.LENGTHS, session.score(prompts), strict=True):
        assert (logits.cpu() - golden[f"logits_{length}"]).abs().max() < MAX_ERROR[dtype]
    if dtype == "float32":
        results = session.generate(prompts, GREEDY, 24)
        assert [result.ids for result in results] == [golden[f"gen_{length}"].tolist() for length in goldens.LENGTHS]


QUANTS = {
    "dense": QuantConfig(),
    "int8": QuantConfig("int8"),
    "int4, int8 cache": QuantConfig("int4", group_size=64, kv_cache="int8"),
    "smooth_quant, fp8 cache": QuantConfig("smooth_quant", per_token=True, kv_cache="fp8"),
    "fp8": QuantConfig("fp8"),
    "fp8 per token": QuantConfig("fp8", per_token=True, per_channel=True),
}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("version, rows", [("v1_7b", 1), ("v2_13b", 4)])
def test_a_graph_computes_the_very_numbers_of_the_kernels_without_it(version, rows, quant):
    """Bit for bit, over a prefill and decode steps that need no padding."""
    prompts = [list(range(5 + row, 69 + row)) for row in range(rows)]
    assert padded_batch_size(rows) == rows and padded_prefill(64 * rows) == 64 * rows
    model, quant = replace(SMALL, model_version=version), QUANTS[quant]
    captured, eager = executor(model, quant), executor(model, quant)
    eager.captures = False
    logits, eager_logits = (greedy_logits(each, prompts, steps=6) for each in (captured, eager))
    assert torch.equal(greedy_logits(captured, prompts, steps=1), eager_logits[:1]), "the prefill, replayed"
    assert captured.graphs._captured and not eager.graphs._captured, "one replays graphs, the other has none"
    assert torch.equal(logits, eager_logits)
    assert not torch.equal(logits[1:], logits[:-1])


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("rows", [3, 11])
def test_padding_changes_only_roundings(rows, quant):
    """Another padded batch is another product, which adds in another order.

    What an 8-bit number rounds to may be its neighbour then, at most 1/127 of the largest away.
    """
    tokens = sum(map(len, some_prompts(rows)))
    assert padded_batch_size(rows) != rows and padded_prefill(tokens) != tokens
    tolerance = 5e-3 if quant in ("dense", "int8") else 3e-2
    padded, eager = executor(quant=QUANTS[quant]), executor(quant=QUANTS[quant])
    eager.captures = False
    expected = greedy_logits(eager, some_prompts(rows), steps=6)
    for _ in range(2):  # captured, then replayed after another prompt was
        assert relative_error(greedy_logits(padded, some_prompts(rows), steps=6), expected) < tolerance
        greedy_logits(padded, [prompt[::-1] for prompt in some_prompts(rows - 1)], steps=2)


def test_chunks_and_lengths_share_a_prefill_graph():
    """Prompts of 40 and of 50 tokens, and the second chunk of one of 90, all run at 64."""
    cuda, eager = executor(), executor()
    eager.captures = False
    for each in (cuda, eager):
        each.reset(1, 128)
    long = [(7 * i) % 390 + 3 for i in range(90)]
    for prompt, past in ((long[:40], 0), (long[:50], 0), (long[:40], 0), (long[40:], 40)):
        step = Step.of([prompt], [past], device=DEVICE)
        assert relative_error(cuda.forward(step), eager.forward(step)) < 5e-3
    assert len(cuda.graphs._captured) == 1


def test_few_tokens_after_many_have_their_keys_split():
    """41 tokens after 960 that the cache holds, captured and replayed, against one program that walks over all keys."""
    split, whole = executor(), executor(switches=Switches(split_keys=False))
    long = [(7 * i) % 390 + 3 for i in range(1001)]
    logits = []
    for cuda in (split, whole):
        cuda.reset(1, 1024)
        cuda.forward(Step.of([long[:960]], device=DEVICE))
        step = Step.of([long[960:]], [960], device=DEVICE)
        logits.append([cuda.forward(step).clone() for _ in range(2)])
        assert len(cuda.graphs._captured) == 1
    assert torch.equal(*logits[0]) and torch.equal(*logits[1])
    assert relative_error(logits[0][1], logits[1][1]) < 5e-3
    assert not torch.equal(logits[0][1], logits[1][1]), "the control: the keys were split"


def some_prompts(rows):
    return [list(range(5 + row, 25 + 2 * row)) for row in range(rows)]


def greedy_logits(cuda, prompts, steps):
    cuda.reset(len(prompts), 128)
    step, kept = Step.of(prompts, device=DEVICE), []
    for _ in range(steps):
        kept.append(cuda.forward(step).clone())
        step = step.next(kept[-1].argmax(-1))
    return torch.stack(kept)


def test_two_hundred_steps_twice_are_the_same_tokens():
    prompts = [[7, 8, 9], [10] * 40]
    limits = BuildConfig(max_batch_size=2, max_output_len=200)
    sampling = SamplingConfig(top_k=20, top_p=0.9, temperature=1.0, random_seed=3, eos_id=-1)
    texts = []
    for _ in range(2):
        session = Session(executor(), SMALL, limits)
        texts += [[result.ids for result in session.generate(prompts, sampling, 200)] for _ in range(2)]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert len(set(texts[0][0])) > 50


def test_graphs_survive_a_smaller_request_and_a_larger_one_is_right():
    """The caches stay as they are for a request that fits, padding rows included, and grow for one that does not."""
    cuda = executor()
    alone = greedy_logits(executor(), [[1, 2, 3]], 4)
    for rows in (4, 1, 3, 1):
        prompts = [[1, 2, 3]] * rows
        assert relative_error(greedy_logits(cuda, prompts, 4)[:, 0], alone[:, 0]) < 5e-3
    cuda.reset(2, 5000)
    long = [list(range(1, 301)) * 10, [1, 2, 3]]
    step = Step.of(long, device=DEVICE)
    cuda.forward(step)
    following = cuda.forward(step.next(torch.tensor([5, 6], device=DEVICE)))
    fresh = executor()
    fresh.reset(2, 3001)
    again = fresh.forward(Step.of([[*long[0], 5], [*long[1], 6]], device=DEVICE))
    assert relative_error(following, again) < 5e-3  # 3000 keys in several splits, against one prefill


def test_rows_that_share_blocks_continue_their_parents():
    cuda = executor()
    cuda.reset(4, 32)
    cuda.cache.set_tables([[1], [2]])
    step = Step.of([[1, 2, 3], [4, 5]], device=DEVICE)
    cuda.forward(step)
    parents, tokens = torch.tensor([1, 1, 0], device=DEVICE), torch.tensor([9, 10, 11], device=DEVICE)
    cuda.cache.copy_blocks([(2, 3)])
    cuda.cache.set_tables([[2], [3], [1]])
    logits = cuda.forward(step.next(tokens, parents))
    whole = executor()
    whole.reset(3, 32)
    expected = whole.forward(Step.of([[4, 5, 9], [4, 5, 10], [1, 2, 3, 11]], device=DEVICE))
    assert relative_error(logits, expected) < 5e-3


def test_a_mixed_step_is_its_parts():
    """Single tokens beside chunks of prompts: the decode kernel beside the prefill kernel."""
    mixed, alone = executor(), executor()
    for each in (mixed, alone):
        each.reset(4, 128)
    prompts, tokens = [[5] * 40, [6] * 9, [7] * 30], [[8], [9] * 20, [10]]
    mixed.forward(Step.of(prompts, device=DEVICE))
    step = Step.of(tokens, [len(prompt) for prompt in prompts], device=DEVICE)
    assert step.mixed
    expected = alone.forward(Step.of([a + b for a, b in zip(prompts, tokens, strict=True)], device=DEVICE))
    for captured in (0, 1, 1):  # without a graph, captured, replayed
        assert relative_error(mixed.forward(step), expected) < 5e-3
        assert sum(size.mixed for size in mixed.graphs._captured) == captured
    shorter = Step.of([[8], [9] * 18, [10]], [len(prompt) for prompt in prompts], device=DEVICE)
    expected = alone.forward(Step.of([[*prompts[0], 8], prompts[1] + [9] * 18, [*prompts[2], 10]], device=DEVICE))
    assert relative_error(mixed.forward(shorter), expected) < 5e-3, "another step of the same size"


def test_requests_in_flight_are_what_they_are_alone():
    """In float32, with prompts that arrive while others decode, more requests than rows, and too few blocks."""
    model = replace(SMALL, dtype="float32")
    limits = BuildConfig(max_batch_size=5, max_input_len=200, max_output_len=60)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (12,), generator=generator).tolist()
    drawn = SamplingConfig(top_k=20, top_p=0.9, temperature=1.0, eos_id=-1)
    requests = [
        Request(n, tuple(torch.randint(3, 400, (length,), generator=generator).tolist()), sampling, 60 - 3 * n)
        for n, length in enumerate(lengths)
        for sampling in [GREEDY if n % 2 else replace(drawn, random_seed=n)]
    ]

    weights = RandomWeights(model, QuantConfig(), DEVICE, 0).rank()
    roomy, tight = (
        CudaExecutor(model, QuantConfig(), weights, pool=PoolSettings(32, most_blocks=blocks)) for blocks in (None, 10)
    )

    def serve(arrivals, executor=roomy, every=3):
        engine = InFlight(executor, model, limits, Policy(32))
        ids, arrivals, step = {}, list(arrivals), 0
        while arrivals or engine.unfinished:
            if arrivals and step % every == 0:
                engine.add(arrivals.pop(0))
            for progress in engine.step():
                ids.setdefault(progress.key, []).extend(progress.new_ids)
            step += 1
        return ids, engine.scheduler.preemptions

    alone = {each.key: serve([each])[0][each.key] for each in requests}
    assert serve(requests)[0] == alone
    ids, preemptions = serve(requests, tight, every=1)
    assert ids == alone and preemptions > 0
    assert len({tuple(each) for each in ids.values()}) == len(ids)


def test_too_large_a_cache_is_refused_with_its_size():
    with pytest.raises(UnsupportedError, match="GB of GPU memory"):
        executor().reset(1, 1 << 27)


def test_padded_batch_sizes():
    assert [padded_batch_size(n) for n in (1, 2, 3, 5, 8, 9, 63, 65, 200, 257)] == [1, 2, 4, 8, 8, 16, 64, 96, 224, 384]


def test_padded_prefills():
    sizes = (2, 16, 17, 100, 129, 500)
    assert [padded_prefill(n) for n in sizes] == [16, 16, 32, 128, 192, 512]
