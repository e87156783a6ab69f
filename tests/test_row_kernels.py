"""The kernels that work row by row against PyTorch in float64: in Triton's interpreter, or
on the GPU where there is one."""

import numpy as np
import pytest
import torch
from kernel_device import DEVICE, MARKS, relative_error
from kernel_numbers import DTYPES, bound, interleaved, normal, value
from torch.nn import functional as F

from baichuan.kernels import store_row
from baichuan.kernels.argmax import argmax
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN, Deinterleaved, E4m3PerToken, Int8PerToken, Int16, StaticScale
from baichuan.kernels.rows import gather_rows, quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.quant.fp8 import token_scale
from baichuan.quant.scaled import quantise, scale_for

pytestmark = MARKS

EPS = 1e-6


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
