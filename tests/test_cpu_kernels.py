"""The C kernels: every product and op against float64, or against the reference, within its error bound."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace

import op_cases
import pytest
import torch
from named_skips import NO_INSTRUCTIONS
from op_cases import CASES, normal

from baichuan.executors.cpu.library import FLAGS, compiled, instruction_sets, library
from baichuan.executors.cpu.native import FEW_ROWS, Kernels
from baichuan.executors.cpu.ops import CpuOps
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cpu.reference_linear import linear as reference_linear
from baichuan.model.ops import ComposedOps
from baichuan.parallel.comm import Solo, run_ranks
from baichuan.quant.scaled import quantise
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight
from baichuan.weights.types import product_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

UNIT = 2.0**-24  # unit roundoff of float32
DEPTH = 512  # channels of a block in native/tile.h
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 2), (3, 30), (48, 64), (97, 100), (53, 1000), (13, 4128)]  # out, in: rows and channels left over
TOKENS = (1, 2, 3, 5, 8, 11, FEW_ROWS, FEW_ROWS + 1, 33, 70)


def matrix_of(weight):
    return product_of(weight, "cpu")(weight).matrix


def kernels(flags=FLAGS, folder=None):
    return Kernels(library() if folder is None else ctypes.CDLL(str(compiled(folder, flags))))


def bound(x, dense, exact, out_dtype):
    """A bound of |y - exact|: a lane adds every fourth product at most, lanes are added, scales multiplied, y rounded.

    Each of these is off by at most UNIT of the sum of magnitudes.
    """
    sums = (dense.shape[1] / 4 + 24) * UNIT * (x.abs() @ dense.abs().T)
    return sums + torch.finfo(out_dtype).eps / 2 * (exact.abs() + sums) + torch.finfo(out_dtype).smallest_normal


def integers_bound(x, dense, weight, x_dtype):
    """What 16-bit integers add to |y - exact|, see native/pack.c: from three tokens on, float16 weights from FEW_ROWS.

    An activation in 16 bits is off by 2^-15 of the largest of its group at most; a float16 weight and the activation it
    meets by 2^-13.
    """
    half = isinstance(weight, DenseWeight) and weight.weight.dtype == torch.float16
    fewest = FEW_ROWS + 1 if half else 3
    if x_dtype == torch.float32 or x.shape[0] < fewest or not (half or isinstance(weight, Int4Weight | Int8Weight)):
        return 0
    group = 32 if half else DEPTH
    if isinstance(weight, Int4Weight) and weight.scale.shape[1] > 1:
        group = dense.shape[1] // weight.scale.shape[1]
    off = (2.0**-13 if half else 2.0**-15) * group_largest(x, group)
    error = off @ dense.abs().T
    if half:
        weight_off = 2.0**-13 * group_largest(dense, group)
        error += (x.abs() + off) @ weight_off.T
    return error


def group_largest(x, group):
    """Each number's group's largest magnitude; the last group of a row may be shorter."""
    return torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(group, 1)], 1)


def cases(shape):
    """(name, weight, its float64 matrix)"""
    matrix = normal(*shape, seed=3) / shape[1] ** 0.5
    for dtype in FLOATS:
        yield f"{dtype}", DenseWeight(matrix.to(dtype)), matrix.to(dtype).double()
    q, scale = quantise_int8(matrix)
    yield "int8", Int8Weight(q, scale), q.double() * scale.double()[:, None]
    for group in (0, 32, 64, 128):
        if shape[1] % (group or 1) == 0:
            for dtype in FLOATS:
                weight = Int4Weight(*quantise_int4(matrix, group, dtype))
                groups = dequantise(Int4Weight(weight.packed, torch.ones_like(weight.scale))).double()
                scales = weight.scale.double().repeat_interleave(shape[1] // weight.scale.shape[1], 1)
                yield f"int4 in groups of {group}, {dtype}", weight, groups * scales
            zero = (5 * normal(*weight.scale.shape, seed=7)).round().clamp(-16, 16).to(torch.int8)
            zeros = zero.double().repeat_interleave(shape[1] // zero.shape[1], 1)
            yield f"int4 with zeros, groups of {group}", replace(weight, zero=zero), (groups - zeros) * scales
    scale = torch.full((shape[0],), 0.001)
    fp8 = quantise(matrix, scale[:, None], torch.float8_e4m3fn)
    yield "fp8", Fp8Weight(fp8, scale, torch.tensor([0.02])), fp8.double() * 0.001
    scale = torch.rand(shape[0], generator=torch.Generator().manual_seed(9)) / 500 + 0.001
    yield "fp8 per token and channel", Fp8Weight(fp8, scale), fp8.double() * scale.double()[:, None]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_float64_within_their_bound(shape, tokens):
    compare(kernels(), shape, tokens)


def fp8_input_scale(x, weight):
    """The weight's own, or the one that makes each token's largest number e4m3's largest."""
    if weight.input_scale is not None:
        return weight.input_scale
    return x.float().abs().amax(1, keepdim=True) / 448


def compare(functions, shape, tokens):
    for name, weight, dense in cases(shape):
        for x_dtype in FLOATS:
            x = normal(tokens, shape[1], seed=5).to(x_dtype)
            seen = x.double()
            if isinstance(weight, Fp8Weight):
                input_scale = fp8_input_scale(x, weight)
                seen = quantise(x, input_scale, torch.float8_e4m3fn).double() * input_scale.double()
            exact = seen @ dense.T
            for out_dtype in {x_dtype, torch.float32}:
                y = functions.product(x, matrix_of(weight), out_dtype)
                assert y.dtype == out_dtype
                limit = bound(seen, dense, exact, out_dtype) + integers_bound(seen, dense, weight, x_dtype)
                assert ((y.double() - exact).abs() <= limit).all(), (name, x_dtype)
                if shape[0] > 1 and out_dtype == torch.float32:  # the bound notices the neighbour's row
                    assert not ((y.double().roll(1, 1) - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 8, 40])
def test_activations_near_their_group_s_largest_are_exact_integers(dtype, tokens):
    """Without the integers' part of the bound: 15 bits hold 11 digits of numbers down to a sixteenth of the largest."""
    x = (normal(tokens, 1000, seed=5).sign() * (1 + 15 * torch.rand(tokens, 1000))).to(dtype)
    for name, weight, dense in cases((53, 1000)):
        if isinstance(weight, Int4Weight | Int8Weight):
            exact = x.double() @ dense.T
            y = kernels().product(x, matrix_of(weight), torch.float32)
            assert ((y.double() - exact).abs() <= bound(x.double(), dense, exact, torch.float32)).all(), name


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_no_wrong_number_becomes_a_right_one(wrong, tokens):
    x = normal(tokens, 100, seed=5)
    x[3, 7] = wrong
    for name, weight, _ in cases((48, 100)):
        if isinstance(weight, Fp8Weight):
            continue  # its activations are clamped
        for dtype in FLOATS:
            y = kernels().product(x.to(dtype), matrix_of(weight), torch.float32)
            assert not y[3].isfinite().any(), (name, dtype)
            assert y[:3].isfinite().all() and y[4:].isfinite().all(), (name, dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("smoothed", [True, False])
def test_smoothquant_has_the_reference_s_integers(shape, tokens, static, smoothed):
    q, scale = quantise_int8(normal(*shape, seed=3))
    smoother = normal(shape[1], seed=4).abs() + 0.5 if smoothed else None
    weight = SmoothQuantWeight(q, scale, torch.tensor([0.02]) if static else None, smoother)
    x = normal(tokens, shape[1], seed=5)
    x[0] = 0  # a token without a maximum
    expected = reference_linear(x, weight, torch.float32, Solo())
    assert torch.equal(kernels().product(x, matrix_of(weight), torch.float32), expected)
    ops = CpuOps(op_cases.rope(), Solo(), op_cases.CAPACITY, kernels())
    assert torch.equal(ops.linear(x, weight), expected)


def test_smoothquant_s_sums_are_exact_beyond_float32():
    q = torch.full((5, 9000), 127, dtype=torch.int8)
    q[:, 1::2] = 126
    weight = SmoothQuantWeight(q, torch.ones(5), torch.ones(1), None)
    for tokens in (1, 40):
        x = torch.full((tokens, 9000), 127.0)
        y = kernels().product(x, matrix_of(weight), torch.float32)
        assert torch.equal(y, torch.full((tokens, 5), float(4500 * 127 * (127 + 126))))


def test_smoothquant_of_several_ranks_has_the_whole_row_s_scale():
    q, scale = quantise_int8(normal(24, 64, seed=3))
    smoother, x = normal(64, seed=4).abs() + 0.5, normal(3, 64, seed=5)

    def body(comm):
        part = slice(32 * comm.rank, 32 * comm.rank + 32)
        weight = SmoothQuantWeight(q[:, part].contiguous(), scale, None, smoother[part])
        ops = CpuOps(op_cases.rope(), comm, op_cases.CAPACITY, kernels())
        mine = x[:, part].contiguous()
        return torch.equal(ops.linear(mine, weight), reference_linear(mine, weight, torch.float32, comm))

    assert run_ranks(2, body) == [True, True]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ops(case):
    ops = CpuOps(case.spec, Solo(), op_cases.CAPACITY, kernels())
    with torch.inference_mode():
        assert op_cases.error(*case.run(ops, lambda result: result, "cpu")) <= case.tolerance


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 15, 100, 5120])
def test_norms_and_activations_round_as_the_reference(dtype, width):
    spec, x, residual = op_cases.rope(), normal(7, width, dtype=dtype), normal(7, width, seed=1, dtype=dtype)
    weight = normal(width, seed=2, dtype=dtype)
    ours, reference = CpuOps(spec, Solo(), 8, kernels()), ReferenceOps(spec, Solo(), 8)
    neighbour = 2 * torch.finfo(dtype).eps  # float32's last bit may decide where the type's falls
    # Processors add the squares up in orders of their own: each of two sums of `width` terms is off by about
    # sqrt(width) / 16 units in float32's last place, and the norm by half of that.
    bound = neighbour + width**0.5 / 16 * torch.finfo(torch.float32).eps
    for given in (residual, None):
        normed, total = ours.add_rms_norm(x, given, weight, 1e-6)
        expected, expected_total = reference.add_rms_norm(x, given, weight, 1e-6)
        torch.testing.assert_close(total, expected_total, rtol=neighbour, atol=1e-7)
        torch.testing.assert_close(normed, expected, rtol=bound, atol=1e-7)
        more = expected.double() * (1 + 3 * bound)
        assert not torch.allclose(normed.double(), more, rtol=bound, atol=1e-7), "the control: three times the bound"
    gate_up = torch.cat((4 * x, residual), 1)
    torch.testing.assert_close(ours.silu_mul(gate_up), reference.silu_mul(gate_up), rtol=neighbour, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3, FEW_ROWS + 1])
def test_fused_ops_are_their_parts(dtype, tokens):
    x, residual = normal(tokens, 64, dtype=dtype), normal(tokens, 64, seed=1, dtype=dtype)
    norm = normal(64, seed=2, dtype=dtype)
    for _, gate_up, _ in cases((96, 64)):
        down_proj = DenseWeight(normal(64, 48, seed=4, dtype=dtype))
        ops = CpuOps(op_cases.rope(), Solo(), 8, kernels())
        for given in (residual, None):
            for name, weights in (("norm_linear", (gate_up,)), ("gated_mlp", (gate_up, down_proj))):
                found = getattr(ops, name)(x, given, norm, *weights, 1e-6)
                parts = getattr(ComposedOps, name)(_Unfused(ops), x, given, norm, *weights, 1e-6)
                assert all(map(torch.equal, found, parts)), (name, type(gate_up))


class _Unfused(ComposedOps):
    """The simple ops of other ops."""

    def __init__(self, ops):
        self.add_rms_norm, self.linear, self.silu_mul = ops.add_rms_norm, ops.linear, ops.silu_mul
        self.all_reduce = ops.all_reduce

    all_reduce = add_rms_norm = linear = silu_mul = select_rows = head = None


def test_the_exponential_ends_where_float32_does():
    gate = torch.tensor([[-1e4, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e4]])
    y = kernels().silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    torch.testing.assert_close(y, torch.nn.functional.silu(gate.double()).float(), rtol=3e-7, atol=1e-34)


@pytest.mark.parametrize("flags", [("-march=haswell",), ("-march=alderlake",), ("-march=skylake-avx512",)], ids=str)
def test_other_processors_of_this_family(tmp_path, flags):
    """AVX2, AVX2 with VNNI, and AVX-512 without later additions, which run where this processor has them."""
    needed = {"-march=haswell": "avx2", "-march=alderlake": "avx_vnni", "-march=skylake-avx512": "avx512bw"}[flags[0]]
    if needed not in instruction_sets():
        pytest.skip(NO_INSTRUCTIONS + needed)
    other = kernels((*FLAGS, *flags), tmp_path)
    for shape in SHAPES[1::2]:
        for tokens in (1, 5, 40):
            compare(other, shape, tokens)
    for case in CASES:
        ops = CpuOps(case.spec, Solo(), op_cases.CAPACITY, other)
        assert op_cases.error(*case.run(ops, lambda result: result, "cpu")) <= case.tolerance, case.name
