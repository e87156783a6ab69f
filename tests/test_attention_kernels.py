"""The kernels of attention, and the one that stores keys and values, against the plain formula in float64: in Triton's
interpreter, or on the GPU where there is one."""

import pytest
import torch
from kernel_device import DEVICE, MARKS, relative_error
from kernel_numbers import DTYPES, ROUNDED, bound, normal
from scattered import row_of, scattered

from baichuan.executors.cuda.graph import Captured, Size
from baichuan.kernels.combine_splits import parts_of
from baichuan.kernels.decode_attention import decode_attention
from baichuan.kernels.kv_store import store_kv
from baichuan.kernels.prefill_attention import prefill_attention
from baichuan.kernels.splits import MOST_COUNTED, MOST_PROGRAMS, Splits, choose_splits
from baichuan.model import position
from baichuan.quant.kv_cache import dequantise_kv, quantise_kv
from baichuan.records import AttentionSpec, Step

pytestmark = MARKS

HEADS, DIM, CAPACITY = 3, 32, 96
SPLITS = Splits(2, 2)  # for single tokens beside prompts, where a test does not say
UNTOUCHED = 96  # exact in every type of cache, and no key that occurs
KV_TYPES = {"dtype": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Attention:
    """A cache that the kernels write, beside what the sequences' k and v have been, for the plain formula."""

    def __init__(self, rotary, kv_type, dtype, rows):
        self.spec = AttentionSpec(HEADS, 2, 2 * HEADS, DIM, rotary)
        self.dtype = dtype
        scales = [None, None] if kv_type is None else [torch.tensor([s], device=DEVICE) for s in (0.03, 0.025)]
        self.cache = scattered(rows, CAPACITY, self.spec, kv_type or dtype, DEVICE, scales, UNTOUCHED)
        self.cos, self.sin = position.rope_table(CAPACITY, self.spec, DEVICE)
        self.slopes = position.alibi_slopes(2 * HEADS)[2 : 2 + HEADS].to(DEVICE)
        self.ended = torch.zeros(MOST_COUNTED, dtype=torch.int32, device=DEVICE)
        self.history = [[] for _ in range(rows)]  # each (k, v) of one step, [new, HEADS, DIM] as stored

    def expected(self, qkv, step):
        """ops.Ops.attention in float64, for k and v rounded as the cache rounds them."""
        out = []
        for row, past in enumerate(self.history):
            new = slice(int(step.cu_seqlens[row]), int(step.cu_seqlens[row + 1]))
            q, k, v = qkv[new].unflatten(-1, (3, HEADS, DIM)).unbind(1)
            positions = step.positions[new]
            if self.spec.rotary:
                cos, sin = self.cos[positions], self.sin[positions]
                q, k = (position.rotate(each, cos, sin).to(self.dtype) for each in (q, k))
            past.append([
                dequantise_kv(quantise_kv(each, scale, self.cache.k.dtype), scale)
                for each, scale in ((k, self.cache.k_scale), (v, self.cache.v_scale))
            ])  # fmt: skip
            keys, values = (torch.cat(each).double().transpose(0, 1) for each in zip(*past, strict=True))
            scores = q.double().transpose(0, 1) @ keys.mT / DIM**0.5
            distance = torch.arange(keys.shape[1], device=DEVICE) - positions[:, None]
            if not self.spec.rotary:
                scores += self.slopes.double()[:, None, None] * distance
            scores.masked_fill_(distance > 0, -torch.inf)
            out.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
        return torch.cat(out)

    def prefill(self, qkv, step, split=False, splits=SPLITS):
        qkv = qkv.clone()
        store_kv(qkv, self.cos, self.sin, self.cache, self.spec, step)
        out = torch.empty(len(qkv), HEADS * DIM, dtype=qkv.dtype, device=DEVICE)
        prefill_attention(qkv, self.slopes, self.cache, self.spec, step, out, split, block_q=16, block_k=16)
        if step.singles:
            self.decode(qkv, step, splits, out)
        return out

    def decode(self, qkv, step, splits, out=None, block=(16, 1)):
        out = torch.empty(len(qkv), HEADS * DIM, dtype=qkv.dtype, device=DEVICE) if out is None else out
        ropes, ended = (self.cos, self.sin, self.slopes), self.ended
        decode_attention(qkv, *ropes, self.cache, self.spec, step, splits, out, ended, block)
        assert not self.ended.any()
        return out


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_prefill_chunk_decode(rotary, kv, dtype):
    """Ragged prompts beside a single token, a further chunk, single tokens with the keys split in several ways."""
    past = [0, 0]
    attention = Attention(rotary, KV_TYPES[kv], dtype, len(past))
    for number, lengths in enumerate([[37, 1], [1, 20], [1, 1], [1, 1], [1, 1]]):
        step = Step.of([[0] * n for n in lengths], past, device=DEVICE)
        past = [p + n for p, n in zip(past, lengths, strict=True)]
        qkv = normal(sum(lengths), 3 * HEADS * DIM, seed=number, dtype=dtype)
        expected = attention.expected(qkv, step)
        splits = {2: Splits(1, 1), 3: Splits(2, 2), 4: Splits(8, 8)}.get(number)
        result = attention.decode(qkv, step, splits) if splits else attention.prefill(qkv, step)
        assert relative_error(result, expected) < bound(dtype)
    for row, length in enumerate(past):
        kept, _ = row_of(attention.cache, row)
        assert (kept[:, length:].float() == UNTOUCHED).all(), "nothing beyond the context is written"
        keys = torch.cat([k for k, _ in attention.history[row]]).transpose(0, 1)
        stored = dequantise_kv(kept[:, :length], attention.cache.k_scale)
        assert relative_error(stored, keys) < 1e-6 or rotary and relative_error(stored, keys) < 3e-3


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("past, lengths", [([70], [20]), ([50, 0, 33], [17, 3, 2]), ([0], [90])])
def test_prefill_splits_its_keys(monkeypatch, rotary, kv, past, lengths):
    """Few queries and many keys, a row of one split's keys beside, no older keys, padded to the size of a graph."""
    attention = Attention(rotary, KV_TYPES[kv], torch.float16, len(past))
    for count, old in ((past, [0] * len(past)), (lengths, past)):
        if not any(count):
            continue
        step = Step.of([[0] * n for n in count], old, device=DEVICE)
        qkv = normal(sum(count), 3 * HEADS * DIM, seed=sum(count))
        expected = attention.expected(qkv, step)
        if count is past:
            attention.prefill(qkv, step)
    padded = Captured(step, Size.of(step)).static
    qkv = torch.cat([qkv, torch.zeros(len(padded.tokens) - len(qkv), qkv.shape[1], dtype=qkv.dtype, device=DEVICE)])
    monkeypatch.setattr("baichuan.kernels.prefill_attention.PROGRAMS", 1 << 10)
    results = []
    for most in (1, 8):
        monkeypatch.setattr("baichuan.kernels.prefill_attention.MAX_SPLITS", most)
        results.append(attention.prefill(qkv, padded, split=True)[: len(expected)])
        assert relative_error(results[-1], expected) < bound(torch.float16)
    assert not torch.equal(*results), "the control: the keys were split"


@pytest.fixture
def nothing_left(monkeypatch):
    """The memory for splits' results begins as NaN: what is read though no split has written it is seen."""

    def parts_of_nan(rows, heads, splits, dim, out):
        parts = parts_of(rows, heads, splits, dim, out)
        return parts if splits == 1 else tuple(each.fill_(torch.nan) for each in parts)

    monkeypatch.setattr("baichuan.kernels.decode_attention.parts_of", parts_of_nan)


@pytest.mark.parametrize("rotary, kv", [(True, "dtype"), (False, "int8"), (False, "fp8")])
def test_a_captured_mixed_step_is_the_step(monkeypatch, nothing_left, rotary, kv):
    """Single tokens beside a chunk, padded to the size of a graph: what is padding is neither read nor stored.

    The keys of single tokens in one split, in two that a kernel combines, and the longer row's in several of its own.
    """
    monkeypatch.setattr("baichuan.kernels.decode_attention.MOST_KEYS", 16)
    lengths, past = [1, 1, 14], [9, 50, 5]
    attention = Attention(rotary, KV_TYPES[kv], torch.float32, len(lengths))
    before, step = (
        Step.of([[0] * n for n in past], device=DEVICE),
        Step.of([[0] * n for n in lengths], past, device=DEVICE),
    )
    qkv = normal(len(before.tokens), 3 * HEADS * DIM, seed=1, dtype=torch.float32)
    expected = attention.expected(qkv, before)
    assert relative_error(attention.prefill(qkv, before), expected) < bound(torch.float32)
    qkv, size = normal(len(step.tokens), 3 * HEADS * DIM, seed=2, dtype=torch.float32), Size.of(step)
    expected, padding = attention.expected(qkv, step), size.tokens - len(qkv)
    assert size == Size(32, 16, 4) and size.mixed
    qkv = torch.cat([qkv, torch.full((padding, qkv.shape[1]), torch.nan, dtype=qkv.dtype, device=DEVICE)])
    static, results = Captured(step, size).static, []
    for splits in (Splits(1, 1), Splits(2, 2), Splits(1, 4)):
        results.append(attention.prefill(qkv, static, splits=splits)[: len(expected)])
        assert relative_error(results[-1], expected) < bound(torch.float32)
    one, _, several = results
    assert torch.equal(several[0], one[0]) and not torch.equal(several[1], one[1]), "the control: the long row is split"
    for row, (length, more) in enumerate(zip(past, lengths, strict=True)):
        assert (row_of(attention.cache, row)[0][:, length + more :].float() == UNTOUCHED).all()


def test_decode_attention_leaves_padding_alone():
    attention = Attention(True, None, torch.float16, 2)
    step = Step.of([[0], [0]], device=DEVICE)
    step.context_lengths[1] = 0
    for splits in (Splits(1, 1), Splits(4, 4), Splits(1, 4)):
        out = attention.decode(normal(2, 3 * HEADS * DIM), step, splits)
        assert (out[1] == 0).all()
        assert (row_of(attention.cache, 1)[0] == UNTOUCHED).all()


@pytest.mark.parametrize(
    "splits, block, kv",
    [(Splits(1, 4), (16, 1), "int8"), (Splits(2, 16), (8, 1), "dtype"), (Splits(2, 16), (8, 1), "fp8")],
)
def test_rows_of_all_lengths(monkeypatch, nothing_left, splits, block, kv):
    """Rows of one key and of one block of keys beside long ones, which have more splits: with blocks of 8 keys one row
    has twelve, of which eight are combined at a time.  Then 16 splits for every row, most of them without keys.
    """
    monkeypatch.setattr("baichuan.kernels.decode_attention.MOST_KEYS", block[0])
    lengths = [90, 1, block[0], 50]
    attention = Attention(False, KV_TYPES[kv], torch.float32, len(lengths))
    past = [n - 1 for n in lengths]
    before, step = (
        Step.of([[0] * n for n in past], device=DEVICE),
        Step.of([[0]] * len(lengths), past, device=DEVICE),
    )
    qkv = normal(len(before.tokens), 3 * HEADS * DIM, dtype=torch.float32)
    attention.expected(qkv, before)
    attention.prefill(qkv, before)
    qkv = normal(len(lengths), 3 * HEADS * DIM, seed=1, dtype=torch.float32)
    expected = attention.expected(qkv, step)
    one, own, same = (attention.decode(qkv, step, each, block=block) for each in (Splits(1, 1), splits, Splits(16, 16)))
    for result in (one, own, same):
        for row, right in zip(result, expected, strict=True):
            assert relative_error(row, right) < bound(torch.float32)
    for _ in range(500 if DEVICE.type == "cuda" else 0):  # NaN where a split is combined before all have stored theirs
        assert torch.equal(attention.decode(qkv, step, splits, block=block), own)
    assert torch.equal(own[1:3], one[1:3]), "short rows are not split"
    for row in (0, 3):
        assert not torch.equal(own[row], one[row]), "the control: long ones are"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("splits", [Splits(1, 1), Splits(1, 4), Splits(4, 4), Splits(32, 32)])
def test_a_query_that_is_no_number_is_seen_in_the_output(splits, value):
    """And nothing that an earlier kernel has left in the output's memory."""
    attention, width = Attention(False, None, torch.float16, 1), HEADS * DIM
    attention.prefill(normal(40, 3 * width), Step.of([[0] * 40], device=DEVICE))
    qkv = normal(1, 3 * width, seed=3)
    qkv[:, 0] = value
    out = torch.full((1, width), 7.0, dtype=torch.float16, device=DEVICE)
    attention.decode(qkv, Step.of([[0]], [40], device=DEVICE), splits, out)
    assert out[:, :DIM].isnan().all() and out[:, DIM:].isfinite().all()


def test_a_query_that_is_no_number_is_seen_in_a_prefill_of_splits(monkeypatch):
    monkeypatch.setattr("baichuan.kernels.prefill_attention.PROGRAMS", 1 << 10)
    attention, width = Attention(False, None, torch.float16, 1), HEADS * DIM
    qkv = normal(40, 3 * width)
    qkv[39, 0] = torch.nan
    out = attention.prefill(qkv, Step.of([[0] * 40], device=DEVICE), split=True)
    assert out[39, :DIM].isnan().all() and out[:39].isfinite().all()


def test_attention_bound_notices_a_wrong_slope():
    attention = Attention(False, None, torch.float16, 1)
    step = Step.of([[0] * 60], device=DEVICE)
    qkv = normal(60, 3 * HEADS * DIM)
    expected = attention.expected(qkv, step)
    attention.slopes = attention.slopes * 1.01
    assert relative_error(attention.prefill(qkv, step), expected) > ROUNDED


def test_choose_splits():
    assert choose_splits(1) == choose_splits(40) == Splits(32, 32)
    assert choose_splits(160) == Splits(4, 32)  # 640 programs, and as many as there may be where rows are long
    assert choose_splits(320) == Splits(2, 16)
    assert choose_splits(40 * 64) == Splits(1, 2)
    assert choose_splits(40 * 128) == choose_splits(40 * 256) == Splits(1, 1)  # enough programs without
    for pairs in range(1, 6000):
        least, most = choose_splits(pairs)
        assert 1 <= least <= most <= 32 and least & (least - 1) == most & (most - 1) == 0
        assert least == most or pairs <= MOST_COUNTED, "each pair whose splits are counted has a counter"
        assert most == 1 or pairs * most <= MOST_PROGRAMS, "and places in parts are numbers of 32 bits"
