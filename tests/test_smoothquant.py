"""SmoothQuant, the 8-bit KV cache and e4m3 against NumPy in float64 and exact arithmetic."""

import numpy as np
import pytest
import torch

from baichuan.parallel.comm import Solo
from baichuan.quant import smoothquant
from baichuan.quant.kv_cache import dequantise_kv, quantise_kv
from baichuan.quant.scaled import quantise, scale_for
from baichuan.quant.smoothquant import MODES, int8_matmul, quantise_input, smooth_weight, smoother
from baichuan.records import SmoothQuantWeight
from baichuan.util.tensor_cores import tensor_cores


def activations(tokens=40, channels=256, seed=0) -> torch.Tensor:
    """Inputs with a few outlier channels, as a trained model's are."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 60
    x[:, 100] *= 25
    return x


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoother_formula(alpha):
    rng = np.random.default_rng(1)
    x, w = rng.gamma(0.5, size=300), rng.gamma(0.5, size=300) + 1e-4
    x[3] = 0
    ours = smoother(torch.tensor(x), torch.tensor(w), alpha).numpy()
    np.testing.assert_allclose(ours, np.maximum(x**alpha / w ** (1 - alpha), 1e-5), rtol=1e-6)
    w[4] = 0
    assert np.isfinite(smoother(torch.tensor(x), torch.tensor(w), alpha).numpy()).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_a_smoothed_weight_is_its_formula_in_float64(mode, alpha, monkeypatch):
    x, w = activations().abs().amax(0), torch.randn(96, 256, generator=torch.Generator().manual_seed(3))
    w[:32, 9] *= 20
    monkeypatch.setattr(smoothquant, "BLOCK_ELEMENTS", 5 * 256)  # blocks that do not divide the rows
    ours = smooth_weight(w, x, smoother(x, w.abs().amax(0), alpha), mode, projections=3)
    s = np.maximum(x.double().numpy() ** alpha / np.abs(w.double().numpy()).max(0) ** (1 - alpha), 1e-5)
    rows = w.double().numpy() * s
    largest = np.abs(rows).max(1) if mode.per_channel else np.abs(rows).reshape(3, -1).max(1).repeat(32)
    np.testing.assert_allclose(ours.smoother, s, rtol=1e-6)
    np.testing.assert_allclose(ours.scale, largest / 127, rtol=1e-6)
    assert (ours.input_scale is None) == mode.per_token
    if ours.input_scale is not None:
        assert ours.input_scale.item() == pytest.approx((x.double().numpy() / s).max() / 127, rel=1e-6)
    differences = np.abs(ours.weight.numpy() - np.rint(rows / (largest / 127)[:, None]))
    assert differences.max() <= 1 and differences.mean() < 1e-3, "one that lies between two integers may fall to either"


@pytest.mark.cuda
def test_tensor_cores_multiply_8_bit_integers_exactly():
    """Sums of 1,024 products of the largest integers, which are nearly 2²⁴, and odd; and random ones."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, (rows, 3000), dtype=torch.int8, generator=generator) for rows in (70, 300))
    x[:8], w[:8] = 127, 127
    x[0, ::1024], w[1, 5] = 126, -1
    with tensor_cores():
        ours = int8_matmul(x.cuda(), w.cuda())
    assert torch.equal(ours.cpu().long(), x.long() @ w.long().T)


def smoothed_product(x, w, alpha, per_token, per_channel):
    """y = x @ wᵀ through 8-bit integers."""
    s = smoother(x.abs().amax(0), w.abs().amax(0), alpha)
    absmax = (w * s).abs().amax(1) if per_channel else (w * s).abs().max().expand(len(w))
    scale = scale_for(absmax, torch.int8)
    q = quantise(w * s, scale[:, None], torch.int8)
    input_scale = None if per_token else scale_for((x / s).abs().max()[None], torch.int8)
    weight = SmoothQuantWeight(q, scale, input_scale, s)
    x8, x_scale = quantise_input(x, weight, Solo())
    return int8_matmul(x8, q).float() * x_scale * scale


def test_smoothing_beats_plain_8_bit_and_finer_scales_beat_coarse():
    x = activations()
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)) * torch.logspace(-1, 0, 64)[:, None]
    exact = x.double() @ w.double().T

    def error(*mode):
        return float((smoothed_product(x, w, *mode).double() - exact).norm() / exact.norm())

    fine = error(0.5, True, True)
    assert fine < 0.012  # 8 bits of each factor: about 1 / (127 sqrt(3)) of the largest value
    assert fine < error(0.5, False, True) and fine < error(0.5, True, False) < error(0.5, False, False) * 1.2
    assert error(0.0, True, True) > 1.5 * fine, "the negative control: outliers stay in the activations"


def test_int8_matmul_is_exact_where_float32_is_not():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (5, 13696), generator=generator, dtype=torch.int8)
    w = torch.randint(100, 128, (9, 13696), generator=generator, dtype=torch.int8)
    x[0] = 127
    exact = x.long() @ w.long().T
    assert torch.equal(int8_matmul(x, w).long(), exact)
    assert (exact > 1 << 24).any(), "beyond what float32 counts exactly"


class Shares:
    """A communicator that knows what the other ranks hold."""

    def __init__(self, others):
        self.others = others

    def all_reduce_max(self, x):
        return torch.stack([x, *self.others]).amax(0)


def test_tokens_have_the_same_integers_at_every_tensor_parallel_size():
    x, s = activations(), torch.rand(256) + 0.5
    weight = SmoothQuantWeight(torch.zeros(1, 256, dtype=torch.int8), torch.ones(1), None, s)
    whole, scale = quantise_input(x, weight, Solo())
    for tp_size in (2, 4):
        shares = list(zip(x.chunk(tp_size, 1), s.chunk(tp_size), strict=True))
        maxima = [(part / part_s).abs().amax(1, keepdim=True) for part, part_s in shares]
        parts = []
        for part, part_s in shares:
            rank_weight = SmoothQuantWeight(weight.weight, weight.scale, None, part_s)
            q, rank_scale = quantise_input(part, rank_weight, Shares(maxima))
            assert torch.equal(rank_scale, scale)
            parts.append(q)
        assert torch.equal(torch.cat(parts, 1), whole)
    alone, _ = quantise_input(x[:, 128:], SmoothQuantWeight(weight.weight, weight.scale, None, s[128:]), Solo())
    assert not torch.equal(alone, whole[:, 128:]), "the negative control: a rank's own maximum gives other integers"


def test_tokens_of_zeros_stay_zero():
    weight = SmoothQuantWeight(torch.ones(1, 4, dtype=torch.int8), torch.ones(1), None, None)
    q, scale = quantise_input(torch.zeros(2, 4), weight, Solo())
    assert not q.any() and torch.isfinite(scale).all()


E4M3_VALUES = np.array(
    sorted(
        sign * magnitude
        for sign in (-1, 1)
        for magnitude in [m * 2.0**-9 for m in range(8)]
        + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    )
)


def test_e4m3_takes_the_nearest_of_its_values():
    """Every finite e4m3 value by its definition: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinity."""
    assert E4M3_VALUES.max() == 448
    x = torch.randn(5000, generator=torch.Generator().manual_seed(4)) * torch.logspace(-4, 3.5, 5000)
    ours = quantise(x, torch.ones(1), torch.float8_e4m3fn).double().numpy()
    nearest = np.abs(x.double().numpy()[:, None] - E4M3_VALUES).min(1)
    np.testing.assert_array_equal(np.abs(ours - x.double().numpy()), nearest)
    assert np.isfinite(ours).all() and ours.max() == 448 and x.max() > 1000
    ties = torch.tensor([17.0, 19.0, 1.0625, -(2.0**-10), 3 * 2.0**-10])  # half way: to the even mantissa
    assert quantise(ties, torch.ones(1), torch.float8_e4m3fn).tolist() == [16, 20, 1, 0, 2.0**-8]


def test_kv_cache_round_trip():
    k = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))

    def error(dtype, factor=1.0):
        scale = factor * scale_for(k.abs().max()[None], dtype)
        stored = quantise_kv(k, scale, dtype)
        assert stored.dtype == dtype
        return float((dequantise_kv(stored, scale) - k).norm() / k.norm())

    assert error(torch.int8) < 1.05 * float(k.abs().max() / 127 / 12**0.5), "uniform rounding errors"
    assert error(torch.float8_e4m3fn) < 2**-4 / 3**0.5, "3 mantissa bits: half a unit is at most 2⁻⁴ of the value"
    assert error(torch.int8, 10) > 5 * error(torch.int8), "the negative control: a q ten times larger in the maximum"
    assert error(torch.int8, 0.5) > 3 * error(torch.int8), "the negative control: clipped"
    assert torch.equal(quantise_kv(k, None, torch.float32), k) and torch.equal(dequantise_kv(k, None), k)
