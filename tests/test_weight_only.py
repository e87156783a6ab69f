"""Weight-only integers against PyTorch's own quantiser, NumPy in float64 and an exhaustive search."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from baichuan.config import PRESETS
from baichuan.errors import CheckpointError, ConfigError
from baichuan.quant.weight_only import (
    check_group_size,
    dequantise,
    fitting_group_sizes,
    pack_int4,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)
from baichuan.records import Int4Weight, Int8Weight


def matrix(out_features=48, in_features=512, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Rows of very different size with a few outliers, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out_features, in_features, generator=generator) * torch.logspace(-3, 0, out_features)[:, None]
    w[:, :: in_features // 4] *= 4
    return w.to(dtype)


def squared_error(approximation: torch.Tensor, w: torch.Tensor) -> float:
    w = w.double()
    return float((approximation.double() - w).square().sum() / w.square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_pytorchs_symmetric_quantisation(dtype):
    w = matrix(dtype=dtype)
    q, scale = quantise_int8(w)
    np.testing.assert_allclose(scale.numpy(), np.abs(w.double().numpy()).max(1) / 127, rtol=1e-6)
    zero = torch.zeros(len(w), dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(w.float(), scale, zero, 0, -127, 127)
    ours = dequantise(Int8Weight(q, scale))
    # PyTorch multiplies by 1 / scale where we divide: at a tie the two may fall on either side.
    different = (ours - theirs).abs() > 1e-6 * scale[:, None]
    assert different.float().mean() < 1e-3
    assert ((ours - w.float()).abs() <= scale[:, None] * 0.5001).all()


def test_a_wrong_scale_is_seen():
    w = matrix()
    q, scale = quantise_int8(w)
    rounding = float((scale.double() ** 2).sum() / 12 * w.shape[1] / w.double().square().sum())
    error = squared_error(dequantise(Int8Weight(q, scale)), w)
    assert 0.9 * rounding < error < 1.1 * rounding, "rounding errors are uniform: a variance of scale² / 12"
    assert squared_error(dequantise(Int8Weight(q, scale * 1.02)), w) > 2 * rounding
    assert squared_error(dequantise(Int8Weight(q, scale.roll(1))), w) > 100 * rounding


@pytest.mark.parametrize("quantise", [quantise_int8, lambda w: quantise_int4(w, 32, torch.float16)])
def test_blocks_of_rows_give_the_integers_of_the_whole(quantise):
    w = matrix(out_features=700)
    whole = quantise(w)
    blocks = [quantise(block) for block in w.split(123)]
    for field, parts in zip(whole, zip(*blocks, strict=True), strict=True):
        assert torch.equal(field, torch.cat(parts))


def test_pack_keeps_every_value_in_its_nibble():
    q = torch.arange(-8, 8).repeat(2, 16)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 128)
    assert packed[0, :2].tolist() == [0x98, 0xBA]  # -8 (0x8) and -7 (0x9): the even channel in the low nibble
    assert torch.equal(unpack_int4(packed), q.to(torch.int8))


@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int4_scales_are_nearly_the_best_there_are(group_size, scale_dtype):
    w = matrix(out_features=8)
    packed, scale = quantise_int4(w, group_size, scale_dtype)
    size = group_size or 512
    assert scale.shape == (8, 512 // size) and scale.dtype == scale_dtype
    groups = w.double().numpy().reshape(-1, size)

    def error(scales):  # [groups, 1] -> squared error of each group, in float64
        q = np.clip(np.round(groups / scales), -8, 7)
        return ((groups - q * scales) ** 2).sum(1)

    largest = np.abs(groups).max(1, keepdims=True)
    grid = np.concatenate([np.linspace(-1 / 3, -1 / 30, 800), np.linspace(1 / 30, 1 / 3, 800)])
    best = np.min([error(largest * fraction) for fraction in grid], axis=0).sum()
    ours = (dequantise(Int4Weight(packed, scale)).double().numpy().reshape(-1, size) - groups) ** 2
    plain = error(largest / 7).sum()
    # 2 %: the search looks at ten scales where the grid has 1600
    assert best * 0.999 <= ours.sum() <= best * 1.02
    assert plain > best * 1.1, "the negative control: without a search the error is clearly larger"


def test_int4_rows_keep_their_integers_when_scales_are_rounded():
    """A scale is rounded to float16 before the integers are taken, so that the integers fit the stored scale."""
    w = matrix()
    packed, scale = quantise_int4(w, 64, torch.float16)
    q = unpack_int4(packed).double().view(48, 8, 64)
    exact = w.double().view(48, 8, 64) / scale.double()[..., None]
    assert ((q - exact.clamp(-8, 7)).abs() <= 0.5001).all()


def test_smaller_groups_are_better():
    w = matrix(out_features=64)
    errors = [squared_error(dequantise(Int4Weight(*quantise_int4(w, g, torch.float16))), w) for g in (32, 64, 128, 0)]
    assert errors == sorted(errors) and errors[0] < 0.8 * errors[-1]


@pytest.mark.parametrize("quantise", [quantise_int8, lambda w: quantise_int4(w, 0, torch.float16)])
def test_rows_of_zeros_and_damaged_rows(quantise):
    w = torch.zeros(2, 64)
    w[1, 3] = 1e-42  # subnormal: its inverse overflows
    q, scale = quantise(w)
    assert torch.isfinite(scale.float()).all()
    assert not (unpack_int4(q) if q.dtype == torch.uint8 else q)[0].any()
    for bad in (float("nan"), float("inf")):
        w[1, 5] = bad
        with pytest.raises(CheckpointError, match="not finite"):
            quantise(w)


def test_groups_must_divide_a_ranks_share():
    inter = PRESETS["v1_13b"].intermediate_size  # 13696
    check_group_size(128, inter, "down_proj")
    with pytest.raises(ConfigError, match="128 does not divide the 6848 .* down_proj; .*_group_size 64"):
        check_group_size(128, inter // 2, "down_proj")
    with pytest.raises(ConfigError, match="use --weight_only_group_size 32"):
        check_group_size(64, inter // 4, "down_proj")
    with pytest.raises(ConfigError, match="use --weight_only_group_size 0"):
        check_group_size(32, 90, "o_proj")
    assert fitting_group_sizes(PRESETS["v1_13b"], 1) == [32, 64, 128]
    assert fitting_group_sizes(PRESETS["v1_13b"], 4) == [32, 64, 128]  # the ranks' shares of the MLP may differ
    assert fitting_group_sizes(replace(PRESETS["v1_13b"], num_heads=80), 16) == [32, 64]
    with pytest.raises(ConfigError, match="pairs"):
        quantise_int4(torch.ones(1, 7), 0, torch.float16)
