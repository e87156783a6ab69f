"""The Triton kernels against PyTorch in float64: in Triton's interpreter, or on the GPU where there is one.

float16 results carry one rounding of 2^-11 (relative, worst case); ROUNDED leaves room for two of them in a row.
"""

from dataclasses import replace
from functools import partial

import drawn
import numpy as np
import pytest
import torch
from kernel_device import DEVICE, MARKS, relative_error
from scattered import row_of, scattered
from torch.nn import functional as F

from baichuan.executors.cuda.graph import Captured, Size
from baichuan.executors.cuda.linear import Choice, choose_kernel
from baichuan.kernels import store_row
from baichuan.kernels.argmax import argmax
from baichuan.kernels.combine_splits import parts_of
from baichuan.kernels.decode_attention import decode_attention
from baichuan.kernels.gemm import gemm
from baichuan.kernels.gemm_int4 import gemm_int4
from baichuan.kernels.gemm_parts import scale_sums
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import gemv_int
from baichuan.kernels.kv_store import store_kv
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import (
    PLAIN,
    Deinterleaved,
    E4m3PerToken,
    Int8PerToken,
    Int16,
    Operand,
    StaticScale,
    plain,
)
from baichuan.kernels.prefill_attention import prefill_attention
from baichuan.kernels.rows import gather_rows, quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.kernels.spec import GemvBlock
from baichuan.kernels.splits import MOST_COUNTED, MOST_PROGRAMS, Splits, choose_splits
from baichuan.kernels.tiles import Tile
from baichuan.model import position
from baichuan.quant.fp8 import token_scale
from baichuan.quant.kv_cache import dequantise_kv, quantise_kv
from baichuan.quant.scaled import quantise, scale_for
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import AttentionSpec, Fp8Weight, Int4Weight, Step

pytestmark = MARKS

ROUNDED = 1e-3
FLOAT32 = 2e-6  # float32 sums of a few hundred terms
EPS = 1e-6
DTYPES = [torch.float16, torch.float32]


def bound(dtype) -> float:
    return {torch.float32: FLOAT32, torch.float16: ROUNDED, torch.bfloat16: 8 * ROUNDED}[dtype]  # three bits fewer


normal = partial(drawn.normal, dtype=torch.float16, device=DEVICE)


def reference_norm(x, residual, weight):
    r = (x if residual is None else x + residual).double()
    return r * torch.rsqrt(r.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(dtype, with_residual):
    x, weight = normal(5, 200, dtype=dtype), normal(200, seed=1, dtype=dtype)
    residual = normal(5, 200, seed=2, dtype=dtype) if with_residual else None
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert relative_error(normed.values, reference_norm(x, residual, weight)) < bound(dtype)
    assert torch.equal(total, x if residual is None else x + residual)
    assert normed.scale is None


@pytest.mark.parametrize("dtype, static", [(d, s) for d in (torch.int8, torch.float8_e4m3fn) for s in (True, False)])
def test_add_rms_norm_quantises_the_very_numbers_it_would_have_returned(dtype, static):
    x, residual, weight = normal(6, 256), normal(6, 256, seed=1), normal(256, seed=2)
    given = torch.tensor([0.02], device=DEVICE)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    int8 = dtype == torch.int8
    form = StaticScale(dtype, given) if static else Int8PerToken() if int8 else E4m3PerToken()
    quantised, quantised_total = add_rms_norm(x, residual, weight, EPS, form)
    values = normed.values.float()
    per_token = scale_for(values.abs().amax(-1), torch.int8) if int8 else token_scale(values).view(-1)
    expected_scale = given if static else per_token
    assert torch.equal(quantised.scale, expected_scale)
    assert torch.equal(total, quantised_total)
    assert torch.equal(quantised.values.float(), quantise(normed.values, expected_scale.view(-1, 1), dtype).float())


def test_a_token_s_largest_number_is_exact_in_e4m3():
    """Also in rows of zeros and of numbers that are too small for their scale."""
    largest = torch.tensor([448, 447.75, 3.53125, 1e-3, 60000, 0, 1e-35], device=DEVICE)
    x = normal(7, 96, dtype=torch.float32).clamp(-3, 3) / 4 * largest[:, None]
    x[:, 5] = -largest
    quantised = quantise_rows(x, E4m3PerToken())
    exact = np.maximum(largest.cpu().numpy() / np.float32(448), np.float32(2.0**-100))
    assert np.array_equal(quantised.scale.cpu().numpy(), exact)
    assert quantised.values[:, 5].float().tolist() == [-448] * 5 + [0, 0]
    assert torch.equal(quantised.scale[:, None], token_scale(x))
    assert torch.equal(quantised.values.float(), quantise(x, token_scale(x), torch.float8_e4m3fn).float())


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.03]), torch.tensor([0.01, 0.02, 0.03, 0.5])])
def test_quantise_rows(smooth, scale):
    x = normal(4, 96)
    x[2] = 0
    smoother = (normal(96, seed=1, dtype=torch.float32).abs() + 0.1) if smooth else None
    smoothed = x.float() / smoother if smooth else x.float()
    scale = None if scale is None else scale.to(DEVICE)
    form = Int8PerToken(smoother) if scale is None else StaticScale(torch.int8, scale, smoother)
    quantised = quantise_rows(x, form)
    expected = scale_for(smoothed.abs().amax(-1), torch.int8) if scale is None else scale
    assert torch.equal(quantised.scale, expected)
    assert torch.equal(quantised.values, quantise(smoothed, expected.view(-1, 1), torch.int8))


@pytest.mark.parametrize("scale", [None, torch.tensor([0.03])], ids=["row scales", "one scale"])
def test_many_rows_that_share_a_smoother_are_as_few(scale, monkeypatch):
    monkeypatch.setattr(store_row, "MANY_ROWS", 16)
    x, smoother = normal(16, 192), normal(192, seed=1, dtype=torch.float32).abs() + 0.1
    scale = None if scale is None else scale.to(DEVICE)
    for run, width in ((quantise_rows, 192), (silu_mul, 96)):
        each = smoother[:width]
        assert (store_row.rows_each(16, each), store_row.rows_each(8, each)) == (8, 1)
        form = Int8PerToken(each) if scale is None else StaticScale(torch.int8, scale, each)
        many, few = run(x, form), [run(part, form) for part in x.split(8)]
        expected = torch.cat([half.values for half in few])
        assert torch.equal(many.values, expected)
        assert scale is not None or torch.equal(many.scale, torch.cat([half.scale for half in few]))
        assert not torch.equal(many.values, expected.roll(1, 0)), "the control: each row in its neighbour's place"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("smooth", [True, False])
def test_quotients_round_as_those_of_divisions(smooth, dtype):
    """Multiples of half a scale or smoother, many of which lie between two numbers, and what is next to those."""
    rows, width = (4, 384) if DEVICE.type == "cpu" else (2048, 4096)
    halves = (torch.arange(rows * width).view(rows, width) % 999 - 499) / 2.0
    divisors = torch.rand(width if smooth else rows, generator=torch.Generator().manual_seed(0)) + 0.5
    x = halves * (divisors if smooth else divisors[:, None])
    towards = (torch.arange(width) % 3 - 1) * torch.inf
    x = torch.where(towards.isnan(), x, torch.nextafter(x, towards.expand_as(x))).to(DEVICE)
    scale, smoother = (torch.ones(rows), divisors) if smooth else (divisors, None)
    scale, smoother = scale.to(DEVICE), None if smoother is None else smoother.to(DEVICE)
    quotients = x / smoother if smooth else x / scale[:, None]
    q = quantise_rows(x, StaticScale(dtype, scale, smoother)).values.float()
    one = torch.ones(1, device=DEVICE)
    assert torch.equal(q, quantise(quotients, one, dtype).float())
    by_reciprocal = x * (1 / smoother if smooth else 1 / scale[:, None])
    assert not torch.equal(q, quantise(by_reciprocal, one, dtype).float()), "the control"


def value(x):
    """What an Int16 operand says, in float64."""
    high, low = x.values.double().unflatten(0, (-1, 2)).unbind(1)
    return (256 * high + low) * x.scale.double()[: len(high), None]  # sums may come after the scales


def interleaved(x):
    """A deinterleaved operand with its columns in their own order."""
    return replace(x, values=x.values.unflatten(-1, (2, -1)).mT.flatten(-2))


def made_by_each_kernel(form):
    """The same rows in this form, by every kernel that can make them."""
    x, residual, weight = normal(3, 192), normal(3, 192, seed=1), normal(192, seed=2)
    return quantise_rows(x, form), add_rms_norm(x, residual, weight, EPS, form)[0], silu_mul(x, form)


@pytest.mark.parametrize("form, in_order", [(Deinterleaved(), PLAIN), (Int16(deinterleaved=True), Int16())])
def test_even_columns_before_odd_ones(form, in_order):
    for made, expected in zip(made_by_each_kernel(form), made_by_each_kernel(in_order), strict=True):
        assert torch.equal(interleaved(made).values, expected.values) and not torch.equal(made.values, expected.values)
        assert made.scale is expected.scale is None or torch.equal(made.scale, expected.scale)


@pytest.mark.parametrize("channels", [32, None])
def test_sums_of_int16_tokens(channels):
    without = made_by_each_kernel(Int16(deinterleaved=True))
    for number, expected in enumerate(without):
        width = expected.values.shape[1]
        made = made_by_each_kernel(Int16(deinterleaved=True, sums=channels or width))[number]
        assert torch.equal(made.values, expected.values) and torch.equal(made.scale[:3], expected.scale)
        high, low = interleaved(expected).values.to(torch.int64).unflatten(0, (-1, 2)).unbind(1)
        sums = (256 * high + low).unflatten(1, (-1, channels or width)).sum(-1)
        assert torch.equal(made.scale[3:].view(sums.shape), 16.0 * sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int16_says_what_the_rows_say_to_half_a_step(dtype):
    """Half a step of max / 32639, for whichever kernel makes the rows."""
    x, residual, weight = (normal(4, 96, seed=seed, dtype=dtype) for seed in range(3))
    x[1, 7], x[2] = 300, 0  # an outlier, as activations have them, and nothing
    weight = weight[0]
    made = [
        (quantise_rows(x, Int16()), x),
        (add_rms_norm(x, residual, weight, EPS, Int16())[0], add_rms_norm(x, residual, weight, EPS)[0].values),
        (silu_mul(x, Int16()), silu_mul(x).values),
    ]
    for int16, expected in made:
        assert int16.values.dtype == torch.int8
        error = (value(int16) - expected.double()).abs().amax(1)
        step = expected.double().abs().amax(1) / 32639
        assert (error <= 0.501 * step).all()
        assert not torch.equal(int16.values[::2], torch.zeros_like(int16.values[::2]))


def test_gather_rows():
    table, rows = normal(11, 70), torch.tensor([3, 0, 10, 3], device=DEVICE)
    assert torch.equal(gather_rows(table, rows), table[rows])


def test_argmax_takes_the_first_of_equal_logits():
    logits = normal(3, 5000, dtype=torch.float32)[:, :4500]
    logits[1, 4400] = logits[1, 2100] = 9
    logits[2] = -torch.inf
    logits[2, 4499] = -1e30
    assert argmax(logits).tolist() == [logits[0].argmax().item(), 2100, 4499]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    gate_up = normal(3, 2 * 150, dtype=dtype, scale=3)
    gate, up = gate_up.double().chunk(2, -1)
    result = silu_mul(gate_up).values
    assert relative_error(result, F.silu(gate) * up) < bound(dtype)
    smoother = normal(150, seed=1, dtype=torch.float32).abs() + 0.1
    quantised = silu_mul(gate_up, Int8PerToken(smoother))
    assert torch.equal(quantised.values, quantise(result.float() / smoother, quantised.scale[:, None], torch.int8))
    e4m3, scale = silu_mul(gate_up, E4m3PerToken()).scaled
    assert torch.equal(scale[:, None], token_scale(result))
    assert torch.equal(e4m3.float(), quantise(result, scale[:, None], torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [True, False])
def test_gemv(dtype, gate):
    """in_features is no multiple of the block, out_features none of the rows of a program."""
    x, weight = normal(1, 176, dtype=dtype), normal(34 if gate else 17, 176, seed=1, dtype=dtype, scale=0.1)
    expected = x.double() @ weight.double().T
    y = gemv(x, weight, dtype, gated=gate, block=GemvBlock(2, 128, 1))
    assert relative_error(y, gated(expected) if gate else expected) < 2 * bound(dtype)


def gated(y):
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def test_gemv_gives_float32_without_rounding():
    x, weight = normal(1, 176), normal(17, 176, seed=1)
    y = gemv(x, weight, torch.float32, block=GemvBlock(2, 128, 1))
    assert relative_error(y, x.double() @ weight.double().T) < FLOAT32


@pytest.mark.parametrize("gate", [True, False])
def test_gemv_int8(gate):
    x = normal(1, 304)
    q, scale = quantise_int8(normal(40 if gate else 20, 304, seed=1, dtype=torch.float32).cpu())
    q, scale = q.to(DEVICE), scale.to(DEVICE)
    int16 = quantise_rows(x, Int16())
    y = gemv_int(int16, q, scale, torch.float32, gate, GemvBlock(2, 64, 1))
    expected = value(int16) @ (q.double() * scale.double()[:, None]).T
    assert relative_error(y, gated(expected) if gate else expected) < FLOAT32


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_gemv_int4(gate, group_size, zeros):
    """12 chunks of 32 channels: a block of words is not filled, and a group of 128 is split over none."""
    x = normal(1, 384)
    weight = normal(48 if gate else 24, 384, seed=1, dtype=torch.float32).cpu()
    packed, scale = (each.to(DEVICE) for each in quantise_int4(weight, group_size, x.dtype))
    zero = zeros_of(scale) if zeros else None
    int16 = quantise_rows(x, Int16(deinterleaved=True, sums=(group_size or 384) if zeros else None))
    y = gemv_int(int16, packed, scale, torch.float32, gate, GemvBlock(2, 32, 1), zero)
    expected = value(interleaved(int16)) @ dequantise(Int4Weight(packed, scale, zero)).double().T
    assert relative_error(y, gated(expected) if gate else expected) < FLOAT32
    if zeros:
        wrong = value(interleaved(int16)) @ dequantise(Int4Weight(packed, scale)).double().T
        assert relative_error(y, gated(wrong) if gate else wrong) > 0.1, "the control: without zeros"


def zeros_of(scale):
    """Zeros from -16 to 16, as a weight of this scale may have them."""
    return (5 * normal(*scale.shape, seed=9, dtype=torch.float32)).round().clamp(-16, 16).to(torch.int8)


@pytest.mark.parametrize("gate", [True, False])
def test_gemv_w8a8_is_exact(gate):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (1, 304), generator=generator).to(DEVICE, torch.int8)
    weight = torch.randint(-127, 128, (36 if gate else 18, 304), generator=generator).to(DEVICE, torch.int8)
    scale, factor = torch.ones(len(weight), device=DEVICE), torch.tensor([2**-13 if gate else 1.0], device=DEVICE)
    integers = x.double() @ weight.double().T
    y = gemv_int(
        Operand(StaticScale(torch.int8, factor), x, factor), weight, scale, torch.float32, gate, GemvBlock(2, 64, 1)
    )
    if gate:
        assert relative_error(y, gated(integers * 2**-13)) < FLOAT32
    else:
        assert torch.equal(y.double(), integers)


TILE = Tile(16, 32, 64, 4, 2)
# In tiles of 64 rows or more gemm.gemm's first operand is x, else the weight.
TILES = [TILE, Tile(16, 32, 32, 4, 2, splits=2), Tile(8, 32, 32, 2, 2, splits=3), Tile(64, 32, 32, 4, 2)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_of_floats_and_of_int8_weights(dtype, tile):
    """19 rows, 40 columns and 96 input channels: no block is filled."""
    x, weight = normal(19, 96, dtype=dtype), normal(40, 96, seed=1, dtype=torch.float32)
    q, scale = quantise_int8(weight)
    expected = x.double() @ (q.double() * scale.double()[:, None]).T
    assert relative_error(gemm(plain(x), q, scale, dtype, tile), expected) < bound(dtype)
    weight = weight.to(dtype)
    assert relative_error(gemm(plain(x), weight, None, dtype, tile), x.double() @ weight.double().T) < bound(dtype)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 16, 32, 64])
@pytest.mark.parametrize("zeros", [False, True])
def test_gemm_of_int4_weights(dtype, group_size, tile, zeros):
    """Blocks of 64 and 32 channels hold several groups, one, or a part of one."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter cannot multiply bfloat16 matrices")
    width = 96 if group_size < 64 else 192
    x, weight = normal(19, width, dtype=dtype), normal(40, width, seed=1, dtype=torch.float32)
    packed, scale = quantise_int4(weight, group_size, dtype)
    zero = zeros_of(scale) if zeros else None
    expected = x.double() @ dequantise(Int4Weight(packed, scale, zero)).double().T
    operand = quantise_rows(x, Deinterleaved())
    assert relative_error(gemm_int4(operand, packed, scale, dtype, tile, zero), expected) < bound(dtype)
    wrong = gemm_int4(replace(operand, values=x), packed, scale, dtype, tile, zero)
    assert relative_error(wrong, expected) > 0.5, "the control: x as it is"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows, row_scales", [(19, True), (19, False), (1, False)])
def test_gemm_w8a8(rows, row_scales, tile):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (rows, 96), generator=generator).to(DEVICE, torch.int8)
    weight = torch.randint(-127, 128, (40, 96), generator=generator).to(DEVICE, torch.int8)
    scale = torch.rand(40, generator=generator).to(DEVICE)
    x_scale = torch.rand(rows if row_scales else 1, generator=generator).to(DEVICE)
    expected = x.double() @ weight.double().T * scale.double() * x_scale.double()[:, None]
    operand = Operand(StaticScale(torch.int8, x_scale), x, x_scale)
    assert relative_error(gemm(operand, weight, scale, torch.float32, tile), expected) < FLOAT32


@pytest.mark.parametrize("tile", [*TILES, Tile(32, 16, 32, 4, 2)])
def test_gemm_of_int16(tile):
    """Sums of 16-bit integers: exact but for the float32 at their end."""
    x, weight = normal(19, 96), normal(40, 96, seed=1, dtype=torch.float32)
    q, scale = quantise_int8(weight)
    int16 = quantise_rows(x, Int16())
    y = gemm(int16, q, scale, torch.float32, tile)
    matrix = (q.double() * scale.double()[:, None]).T
    assert relative_error(y, value(int16) @ matrix) < FLOAT32
    assert relative_error(y, x.double() @ matrix) < 1e-4
    assert relative_error(y, value(int16).flip(0) @ matrix) > 1, "the control: another token"


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter cannot multiply e4m3 matrices")
@pytest.mark.parametrize("tile", TILES[:2])
@pytest.mark.parametrize("rows", [1, 19])
def test_gemm_fp8(rows, tile):
    x = normal(rows, 96, dtype=torch.float32).to(torch.float8_e4m3fn)
    weight = normal(40, 96, seed=1, dtype=torch.float32).to(torch.float8_e4m3fn)
    scale = torch.rand(40, device=DEVICE)
    for x_scale in (torch.rand(1, device=DEVICE), torch.rand(rows, device=DEVICE)):
        expected = x.double() @ weight.double().T * scale.double() * x_scale.double().view(-1, 1)
        operand = Operand(StaticScale(x.dtype, x_scale), x, x_scale)
        y = gemm(operand, weight, scale, torch.float16, tile)
        assert relative_error(y, expected) < ROUNDED
        assert relative_error(y, expected.roll(1, 1)) > 0.1, "the control: another channel's scale"


@pytest.mark.parametrize("x_scales", [1, 19])
def test_scale_sums(x_scales):
    sums, x_scale, scale = normal(19, 40, dtype=torch.float32), *(torch.rand(n, device=DEVICE) for n in (x_scales, 40))
    y = scale_sums(sums, x_scale, scale, torch.float16)
    expected = sums.double() * x_scale.double().view(-1, 1) * scale.double()
    assert y.dtype == torch.float16 and relative_error(y, expected) < ROUNDED
    assert relative_error(y, expected.roll(1, 1)) > 0.1, "the control: another channel's scale"


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(96, 160), (40, 96)], ids=["cuBLASLt", "a shape that it does not take"])
@pytest.mark.parametrize("scales", [1, 130], ids=["one scale", "per token"])
def test_fp8_products_of_many_tokens(shape, scales):
    """Those of a library, and our kernel's where it has none, with the same scales."""
    weight = normal(*shape, seed=1, dtype=torch.float32).to(torch.float8_e4m3fn)
    x = normal(130, shape[1], dtype=torch.float32).to(torch.float8_e4m3fn)
    x_scale, scale = torch.rand(scales, device=DEVICE), torch.rand(shape[0], device=DEVICE)
    kernel = choose_kernel(Fp8Weight(weight, scale, x_scale), Choice(130, torch.float16))
    y = kernel.run(Operand(StaticScale(x.dtype, x_scale), x, x_scale), torch.float16)
    expected = x.double() @ weight.double().T * scale.double() * x_scale.double().view(-1, 1)
    assert relative_error(y, expected) < ROUNDED
    assert relative_error(y, expected.roll(1, 1)) > 0.1, "the control: another channel's scale"


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
