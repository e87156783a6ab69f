"""The model, the reference executor and the CPU's own against the original code's numbers."""

from dataclasses import replace

import golden_sessions
import goldens
import pytest
import torch
from golden_sessions import GREEDY
from goldens import FLOAT32_TOLERANCE, LENGTHS, VERSIONS_WITH_GOLDENS

from baichuan.config import QuantConfig
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.executors.cpu.reference_linear import linear
from baichuan.generation.blocks import BlockPool
from baichuan.generation.session import Session
from baichuan.generation.tables import BlockTables
from baichuan.model import position
from baichuan.parallel.comm import run_ranks
from baichuan.records import DenseWeight, Step
from baichuan.weights.hub.checkpoint import open_checkpoint

TP_SIZES = [("v1_7b", 1), ("v1_7b", 2), ("v1_7b", 4), ("v2_13b", 1), ("v2_13b", 2), ("v2_13b", 5)]
KINDS = (ReferenceExecutor, CpuExecutor)
# Largest and mean difference of logits whose standard deviation is about 3, from the goldens' README: rounding every
# activation to 11 (float16) or 8 (bfloat16) bits.
ROUNDED = {"float16": (0.07, 0.008), "bfloat16": (0.5, 0.07)}


def prompts(version):
    return [goldens.golden(version)[f"ids_{length}"].tolist() for length in LENGTHS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("version", "tp_size"), TP_SIZES)
def test_float32_equals_the_original(version, tp_size, kind):
    golden = goldens.golden(version)

    def run(session):
        scores = session.score(prompts(version))
        return scores, [session.generate([prompt], GREEDY, 24, keep_logits=True)[0] for prompt in prompts(version)]

    scores, generations = golden_sessions.on_ranks(version, "float32", tp_size, run, kind)
    for length, logits, generation in zip(LENGTHS, scores, generations, strict=True):
        assert (logits - golden[f"logits_{length}"]).abs().max() <= FLOAT32_TOLERANCE
        assert generation.ids == golden[f"gen_{length}"].tolist()
        assert (generation.logits - golden[f"gen_logits_{length}"]).abs().max() <= FLOAT32_TOLERANCE
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("version", "tp_size"), TP_SIZES[::2])
def test_lower_precisions_are_near_the_original(version, tp_size, dtype, kind):
    scores = golden_sessions.on_ranks(version, dtype, tp_size, lambda session: session.score(prompts(version)), kind)
    largest, mean = ROUNDED[dtype]
    for length, logits in zip(LENGTHS, scores, strict=True):
        error = (logits - goldens.golden(version)[f"logits_{length}"]).abs()
        assert error.max() <= largest
        assert error.mean() <= mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS_WITH_GOLDENS)
@pytest.mark.parametrize("max_num_tokens", [0, 300, 20, 4])
def test_a_ragged_batch_in_chunks_equals_single_prompts(version, max_num_tokens, kind):
    session = golden_sessions.session(
        version, kind=kind, max_batch_size=4, max_beam_width=1, max_num_tokens=max_num_tokens
    )
    steps, forward = [], session.executor.forward
    session.executor.forward = lambda step: steps.append(step) or forward(step)
    generations = session.generate(prompts(version), GREEDY, 24)
    expected = [goldens.golden(version)[f"gen_{length}"].tolist() for length in LENGTHS]
    assert [generation.ids for generation in generations] == expected
    assert max(step.tokens.shape[0] for step in steps) <= (max_num_tokens or sum(LENGTHS))
    prefills = -(-sum(LENGTHS) // (max_num_tokens or sum(LENGTHS)))
    assert len(steps) == prefills + 23 and {step.max_new_tokens for step in steps[prefills:]} == {1}


def score_with(version, **changes):
    """Logits of the prompt of 33 tokens from changed weights."""
    weights = replace(golden_sessions.weights(version), **changes)
    model = golden_sessions.model(version)
    session = Session(ReferenceExecutor(model, QuantConfig(), weights), model, golden_sessions.LIMITS)
    return session.score([prompts(version)[2]])[0]


def distance(version, logits):
    return (logits - goldens.golden(version)["logits_33"]).abs().max()


def test_a_head_that_is_not_normalised_is_noticed():
    normalised = golden_sessions.weights("v2_13b").lm_head
    stored = open_checkpoint(goldens.checkpoint("v2_13b"), golden_sessions.model("v2_13b"))["lm_head.weight"]
    raw = replace(normalised, weight=stored.read(0, stored.shape[0]).float())
    assert distance("v2_13b", score_with("v2_13b")) <= FLOAT32_TOLERANCE
    assert distance("v2_13b", score_with("v2_13b", lm_head=raw)) > 1


def test_wrong_slopes_are_noticed(monkeypatch):
    right = position.alibi_slopes
    monkeypatch.setattr(position, "alibi_slopes", lambda heads: right(heads).roll(1))
    assert distance("v2_13b", score_with("v2_13b")) > 0.1


def test_wrong_positions_are_noticed(monkeypatch):
    right = position.rope_table
    monkeypatch.setattr(position, "rope_table", lambda *args: [each.roll(1, 0) for each in right(*args)])
    assert distance("v1_7b", score_with("v1_7b")) > 0.01


def test_rows_share_blocks_and_part_where_they_differ():
    """Two prompts fork into four rows, one of which is left alone: tables move, and a block with two writers."""
    version, golden = "v1_7b", goldens.golden("v1_7b")
    executor = golden_sessions.session(version).executor
    executor.reset(4, 64)
    cache, size = executor.cache, executor.cache.tokens_per_block
    pool, lengths = BlockPool(cache.blocks, size), [7, 33]
    rows = [BlockTables(pool) for _ in lengths]
    for tables, length in zip(rows, lengths, strict=True):
        tables.make_room(0, length)
    cache.set_tables([tables.rows[0] for tables in rows])
    logits = executor.forward(Step.of([prompts(version)[1], prompts(version)[2]]))
    chosen = [golden["gen_7"].tolist(), golden["gen_33"].tolist()]
    for tables in rows:
        tables.fork([0, 0])
    copies = [copy for tables, n in zip(rows, lengths, strict=True) for copy in tables.make_room(n, n + 1)]
    assert len(copies) == 2, "neither prompt ends with a full block"
    cache.copy_blocks(copies)
    cache.set_tables([row for tables in rows for row in tables.rows])
    tokens = [[chosen[0][0]], [9], [9], [chosen[1][0]]]  # 9: the row that parts from the golden one
    logits = executor.forward(Step.of(tokens, [7, 7, 33, 33]))
    assert logits.argmax(-1)[[0, 3]].tolist() == [chosen[0][1], chosen[1][1]]
    rows[0].fork([0])
    rows[1].fork([1])
    cache.set_tables([tables.rows[0] for tables in rows])
    logits = executor.forward(Step.of([[chosen[0][1]], [chosen[1][1]]], [8, 34]))
    assert logits.argmax(-1).tolist() == [chosen[0][2], chosen[1][2]]


def test_a_shortened_sequence_continues_as_if_the_rest_had_never_been():
    version = "v2_13b"
    executor, prompt = golden_sessions.session(version).executor, prompts(version)[2]
    executor.reset(1, 64)
    executor.forward(Step.of([[*prompt, 9, 10, 11]]))
    continued = executor.forward(Step.of([[12, 13]], [len(prompt)])).clone()
    executor.reset(1, 64)
    expected = executor.forward(Step.of([[*prompt, 12, 13]]))
    assert torch.allclose(continued, expected, rtol=0, atol=1e-5 * expected.std().item())  # sums of other lengths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", ["the weight's", torch.float32])
def test_one_row_is_summed_in_float32(dtype, out_dtype):
    """Its kernels differ from those of several rows; ranks that are threads take turns at the switch they need."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 2000, generator=generator).to(dtype), torch.randn(999, 2000, generator=generator).to(dtype)
    out_dtype = dtype if out_dtype == "the weight's" else out_dtype
    exact = x.double() @ w.double().T
    before = torch.backends.mkldnn.enabled
    for y in run_ranks(4, lambda comm: [linear(x, DenseWeight(w), out_dtype, comm) for _ in range(20)][-1]):
        # rounded once, and the sums' own error: sums in the weight's dtype would be off by ten times more
        slack = torch.finfo(out_dtype).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
        assert y.dtype == out_dtype and ((y.double() - exact).abs() <= slack).all()
    assert torch.backends.mkldnn.enabled == before
