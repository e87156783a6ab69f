"""The INT4 search on a GPU finds the CPU's integers."""

import pytest
import torch

from baichuan.quant.weight_only import quantise_int4, quantise_int8

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, 0])
def test_the_integers_and_scales_are_the_cpus(dtype, group_size):
    """Normal and heavy-tailed rows; float32 weights' sums are rounded, so that one group in thousands may differ."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 5120, generator=generator)
    for rows in (normal.to(dtype), (normal * normal.abs()).to(dtype)):
        packed, scale = quantise_int4(rows, group_size, torch.float16)
        on_gpu, gpu_scale = (each.cpu() for each in quantise_int4(rows.cuda(), group_size, torch.float16))
        other = (scale != gpu_scale).double().mean().item() + (packed != on_gpu).double().mean().item()
        assert other == 0 if dtype != torch.float32 else other < 1e-3
    assert not torch.equal(packed, quantise_int4(rows.flip(0), group_size, torch.float16)[0]), "the negative control"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_int8_integers_are_the_cpus(dtype):
    rows = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    for one, other in zip(quantise_int8(rows), quantise_int8(rows.cuda()), strict=True):
        assert torch.equal(one, other.cpu())
