"""The kernels of matrix products against PyTorch in float64: in Triton's interpreter, or
on the GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from kernel_device import DEVICE, MARKS, relative_error
from kernel_numbers import DTYPES, FLOAT32, ROUNDED, bound, interleaved, normal, value
from torch.nn import functional as F

from baichuan.executors.cuda.linear import Choice, choose_kernel
from baichuan.kernels.gemm import gemm
from baichuan.kernels.gemm_int4 import gemm_int4
from baichuan.kernels.gemm_parts import scale_sums
from baichuan.kernels.gemv import gemv
from baichuan.kernels.gemv_int import gemv_int
from baichuan.kernels.operand import Deinterleaved, Int16, Operand, StaticScale, plain
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.spec import GemvBlock
from baichuan.kernels.tiles import Tile
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import Fp8Weight, Int4Weight

pytestmark = MARKS


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


@pytest.mark.parametrize("x_scales", [1, 19])
def test_scale_sums_adds_up_parts(x_scales):
    parts = torch.randint(-(1 << 20), 1 << 20, (3, 19, 40), dtype=torch.int32, device=DEVICE)
    x_scale, scale = (1e-6 * torch.rand(n, device=DEVICE) for n in (x_scales, 40))
    expected = parts.sum(0).float() * x_scale.view(-1, 1) * scale
    assert torch.equal(scale_sums(parts, x_scale, scale, torch.float32), expected)
    assert not torch.equal(scale_sums(parts[:2], x_scale, scale, torch.float32), expected), "the control: a part less"


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
