"""W8A8 products of several tokens on Hopper: the bits of exact sums, in every shape of Baichuan, alone and replayed."""

import pytest
import torch
from kernel_device import DEVICE, MARKS

from baichuan.config import PRESETS, ModelConfig, QuantConfig
from baichuan.executors.cuda import linear
from baichuan.executors.cuda.executor import CudaExecutor
from baichuan.executors.cuda.linear import Choice, choose_kernel, in_gluon
from baichuan.kernels.gemm import gemm
from baichuan.kernels.operand import Int8PerToken, Operand, StaticScale
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.kernels.tiles import FEW_ROWS, TILE_128, TILE_160, TILE_256, Tile, choose_runs_tile
from baichuan.records import SmoothQuantWeight, Step
from benchmarks.random_weights import RandomWeights

pytestmark = MARKS

HOPPER = DEVICE.type == "cuda" and linear.has_gluon(DEVICE, linear.triton.__version__)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
FEW = [tile for _, tiles, split_tile in FEW_ROWS for tile in (*tiles, split_tile) if tile != TILE_256]
TRITON_TILE = Tile(128, 128, 128, 8, 3)  # the tile of gemm.gemm, which this file's products are compared with


def matrices(model, ranks):
    """(out_features, in_features) of a rank's four products."""
    hidden, share = model.hidden_size, model.intermediate_size // ranks
    return [(3 * hidden // ranks, hidden), (hidden, hidden // ranks), (2 * share, hidden), (hidden, share)]


SHAPES = sorted({shape for version in PRESETS for ranks in (1, 2, 4) for shape in matrices(PRESETS[version], ranks)})


def operand(rows, in_features, row_scales, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randint(-128, 128, (rows, in_features), generator=generator, dtype=torch.int8, device=DEVICE)
    scale = torch.rand(rows if row_scales else 1, generator=generator, device=DEVICE) * 1e-3
    form = Int8PerToken() if row_scales else StaticScale(torch.int8, scale)
    return Operand(form, values, scale)


def exact(x, weight, scale, dtype):
    """y by float64, in which PyTorch sums products of int8 exactly; scaled and rounded as documented."""
    sums = (x.values.double() @ weight.double().t()).float()
    return (sums * x.scale.view(-1, 1) * scale).to(dtype)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("row_scales", [False, True], ids=["one scale", "row scales"])
@pytest.mark.parametrize("tile", [TILE_128, TILE_160, TILE_256, *FEW], ids=["narrow", "wide", "large", *map(str, FEW)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_product_bit_for_bit(shape, tile, row_scales):
    from baichuan.kernels.gemm_int8 import gemm_int8

    out_features, in_features = shape
    weight = operand(out_features, in_features, False, 1).values
    scale = torch.rand(out_features, device=DEVICE)
    many = ((129, torch.bfloat16), (1000, torch.float16), (1024, torch.float16))
    few = ((40, torch.bfloat16), (64, torch.float16), (128, torch.float16))
    for rows, dtype in ((1, torch.float32), *(few if tile in FEW else many)):
        x = operand(rows, in_features, row_scales)
        y = gemm_int8(x, weight, scale, dtype, tile)
        expected = exact(x, weight, scale, dtype)
        assert torch.equal(y, expected)
        assert torch.equal(y, gemm(x, weight, scale, dtype, TRITON_TILE))
        x.values[-1, -1] ^= 64
        changed = gemm_int8(x, weight, scale, dtype, tile)
        assert torch.equal(changed[:-1], y[:-1])
        assert not torch.equal(changed[-1], y[-1]), "the control: the last number of the last row"


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [matrices(PRESETS[v], n)[2] for v in ("v1_7b", "v1_13b") for n in (1, 2, 4)], ids=str)
def test_an_activation_in_the_product_has_the_bits_of_silu_mul(shape, dtype, smooth):
    from baichuan.kernels.gemm_int8 import gated_int8

    out_features, in_features = shape
    weight = operand(out_features, in_features, False, 1).values
    scale = torch.rand(out_features, device=DEVICE) * 0.03  # y's deviation is 3
    smoother = torch.rand(out_features // 2, device=DEVICE) + 0.5 if smooth else None
    form = StaticScale(torch.int8, torch.full((1,), 0.05, device=DEVICE), smoother)
    for rows, row_scales in ((1000, False), (1024, False), (300, True)):
        x = operand(rows, in_features, row_scales)
        expected = silu_mul(gemm(x, weight, scale, dtype, TRITON_TILE), form).values
        assert torch.equal(gated_int8(x, weight, scale, form, dtype).values, expected)
        assert expected.float().std() > 5, "not only zeros"
        swapped = weight.roll(out_features // 2, 0)
        assert not torch.equal(gated_int8(x, swapped, scale, form, dtype).values, expected), "the control: up as gate"


def test_the_wider_tile_is_taken_where_it_saves_a_wave():
    """The tile that was faster on an H200 (docs/performance.md), by (rows, output channels)."""
    faster = {
        (1024, 5120): TILE_160,
        (2048, 5120): TILE_160,
        (512, 27392): TILE_160,
        (512, 5120): TILE_128,
        (1024, 27392): TILE_128,
    }
    for (rows, channels), tile in faster.items():
        assert choose_runs_tile(rows, 4096, channels, 132) == tile
    assert choose_runs_tile(16384, 5120, 5120, 132) == TILE_256


def test_the_tile_of_few_rows():
    """The tile that was faster on an H200 or within 1 % of it (docs/performance.md), by (rows, inputs, outputs)."""
    (_, [narrow_64], split_64), (_, [narrow, wide, widest], split) = FEW_ROWS
    faster = {
        (64, 5120, 27392): narrow_64,
        (33, 5120, 5120): narrow_64,
        (64, 13696, 5120): split_64,
        (128, 5120, 5120): narrow,
        (65, 5120, 7680): narrow,
        (128, 5120, 13696): wide,
        (128, 5120, 15360): wide,
        (128, 5120, 27392): widest,
        (128, 4096, 22016): widest,
        (128, 13696, 5120): split,
        (128, 11008, 4096): split,
    }
    # What four GPUs have was timed in whole steps alone: qkv is then the matrix with more input channels.
    faster |= {(64, 5120, 3840): split_64, (64, 3424, 5120): narrow_64, (128, 5120, 3840): split}
    for (rows, inputs, outputs), tile in faster.items():
        assert choose_runs_tile(rows, inputs, outputs, 132) == tile
    assert choose_runs_tile(129, 13696, 5120, 132).splits == 1


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("row_scales", [False, True], ids=["one scale", "row scales"])
def test_a_chain_in_a_graph_reads_what_was_just_written(row_scales):
    """Each product's rows are quantised by a kernel that lets it start early; 200 replays over changing inputs."""
    from baichuan.kernels.gemm_int8 import gemm_int8

    rows, width, depth = 777, 2048, 12
    form = Int8PerToken() if row_scales else StaticScale(torch.int8, torch.full((1,), 0.05, device=DEVICE))
    weights = [operand(width, width, False, seed).values for seed in range(depth)]
    scale = torch.full((width,), 5e-4, device=DEVICE)
    inputs = [
        torch.randn(rows, width, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).half()
        for seed in range(4)
    ]

    def chain(x, product, **tile):
        for weight in weights:
            x = product(quantise_rows(x, form), weight, scale, torch.float16, **tile)
        return x

    expected = [chain(x, gemm, tile=TRITON_TILE) for x in inputs]
    assert not torch.equal(expected[0], expected[1]), "the control: other inputs, other results"
    x = inputs[0].clone()
    chain(x, gemm_int8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, gemm_int8)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    stale = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for replay in range(200):
        x.copy_(inputs[replay % 4])
        graph.replay()
        wrong += (y != expected[replay % 4]).sum()
        stale += (y == expected[(replay - 1) % 4]).all()
    assert wrong.item() == 0 and stale.item() == 0
    assert expected[0].isfinite().all() and expected[0].float().std() > 0.1


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("rows", [33, 120, 600])
@pytest.mark.parametrize("per_token", [False, True], ids=["one scale", "row scales"])
def test_whole_steps_have_the_bits_of_tritons_own_product(per_token, rows, monkeypatch):
    """Prompts of three tokens each and a decode step, which is replayed."""
    model = ModelConfig("v1_13b", 512, 3, 4, 1024, 400, dtype="float16")
    quant = QuantConfig("smooth_quant", per_channel=True, per_token=per_token, kv_cache="int8")
    weights = RandomWeights(model, quant, DEVICE).rank()
    prompts = [[3 + row % 390, 5, 7] for row in range(rows)]

    def logits():
        cuda = CudaExecutor(model, quant, weights)
        cuda.reset(rows, 16)
        prefill = cuda.forward(Step.of(prompts, device=DEVICE)).clone()
        decode = Step.of([[row % 400] for row in range(rows)], [3] * rows, device=DEVICE)
        return [prefill, *(cuda.forward(decode).clone() for _ in range(3))]

    by_gluon = logits()
    monkeypatch.setattr(linear, "GLUON_ROWS", 1 << 30)
    by_triton = logits()
    for one, other in zip(by_gluon, by_triton, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    assert not torch.equal(by_triton[0], by_triton[1]), "the control: another step"


def test_where_the_kernel_is_chosen(monkeypatch):
    """On Hopper under a version of Triton that it is written for, by int8 in rows of whole 16 bytes."""
    weight = torch.zeros(32, 64, dtype=torch.int8)
    record = SmoothQuantWeight(weight, torch.ones(32), torch.ones(1), None)

    def activates(rows, **choice):
        return choose_kernel(record, Choice(rows, torch.float16, **choice)).run_activated is not None

    assert not in_gluon(weight) and not activates(600), "not on the CPU"
    monkeypatch.setattr(linear, "overlaps", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    linear.has_gluon.cache_clear()
    try:
        assert in_gluon(weight) and activates(linear.ACTIVATED_ROWS)
        assert not activates(linear.ACTIVATED_ROWS - 1) and not activates(600, own_kernels=False)
        for version, has in {
            "3.5.1": False,
            "3.6.0+git9844da95": True,
            "3.9.0": True,
            "3.10.0": False,
            "4.0": False,
        }.items():
            assert linear.has_gluon(weight.device, version) == has
        assert not in_gluon(weight[:, 1:]), "not contiguous"
        assert not in_gluon(weight.flatten()[1:1985].view(31, 64)), "not at a multiple of 16 bytes"
        assert not in_gluon(torch.zeros(32, 72, dtype=torch.int8)), "rows of 72 bytes"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        linear.has_gluon.cache_clear()
        assert not in_gluon(weight), "another generation"
    finally:
        linear.has_gluon.cache_clear()
