"""AWQ's integers and factors of a matrix against their definition in NumPy and float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_problems import CHANNELS, FORM, moments, objective, problem

from baichuan.config import WeightOnly
from baichuan.errors import CheckpointError
from baichuan.quant.awq import EXPONENTS, awq, factors
from baichuan.quant.gptq import gptq
from baichuan.quant.grid import dequantised, nearest, search_grid
from baichuan.quant.weight_only import dequantise, quantise_int4
from baichuan.records import Int4Weight

FORMS = {
    "groups of 32": WeightOnly("int4", 32, symmetric=True),
    "groups of 32 with zeros": WeightOnly("int4", 32),
    "groups of 64 with zeros": WeightOnly("int4", 64),
    "rows": WeightOnly("int4", symmetric=True),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def defined(w, h, form):
    """AWQ's values in float64: for each exponent the columns grow, and each group of each row is rounded with one
    clipping; the exponent of the least error wins, and each group takes the clipping that is best for its own products.
    """
    size = np.sqrt(np.diag(h))
    size = np.maximum(size, 0.01 * size.mean())

    def values(exponent, clippings):
        factor = size**exponent
        return clipped(w * factor, h / np.outer(factor, factor), form, clippings) / factor

    errors = [error_of(w - values(exponent, [[1.1], [1.1]]), h) for exponent in EXPONENTS]
    return values(EXPONENTS[np.argmin(errors)], ALL_CLIPPINGS)


def error_of(left, h):
    return np.einsum("ri,ij,rj->", left, h, left)


ALL_CLIPPINGS = [np.arange(0.85, 1.61, 0.05), np.arange(0.95, 1.71, 0.05)]  # for scales alone, for scales with zeros


def clipped(w, h, form, clippings=ALL_CLIPPINGS):
    values, size = np.zeros_like(w), form.group_size or w.shape[1]
    for start in range(0, w.shape[1], size):
        channels = slice(start, start + size)
        for row, group in enumerate(w[:, channels]):
            if group.any():
                values[row, channels] = clipped_group(group, h[channels, channels], form.zero_points, *clippings)
    return values


def clipped_group(group, h, zeros, of_scales, of_zeros):
    middle, grids = (
        (group.max() + group.min()) / 2,
        [(group[np.abs(group).argmax()] / clip / -8, 0) for clip in of_scales],
    )
    if zeros:
        scales = [np.ptp(group) / 15 / clip for clip in of_zeros]
        grids += [(scale, np.clip(np.rint(-0.5 - middle / scale), -16, 16)) for scale in scales]
    tried = []
    for scale, zero in grids:
        steps = np.clip(np.rint(group / scale) + zero, -8, 7) - zero
        scale = (group @ h @ steps) / (steps @ h @ steps)  # the best for these integers
        tried.append(scale * (np.clip(np.rint(group / scale) + zero, -8, 7) - zero))
    return min(tried, key=lambda values: error_of((group - values)[None], h))


@each_form
def test_the_error_is_that_of_the_definition(form):
    w, hessian = problem()
    exact, h = w.double().numpy(), hessian.double().numpy()
    found = objective(w, dequantised(*awq(w, moments(hessian), form, torch.float32)), hessian)
    # float32 may take the other of two clippings that are as good
    assert found == pytest.approx(error_of(exact - defined(exact, h, form), h), rel=5e-3)
    assert found < 0.98 * error_of(exact - clipped(exact, h, form), h), "the control: no factors"


@each_form
def test_the_error_is_below_rounding_s_and_needs_the_right_inputs(form):
    w, hessian = problem()
    rounding = dequantise(Int4Weight(*quantise_int4(w, form.group_size, torch.float16)))
    found = objective(w, dequantised(*awq(w, moments(hessian), form, torch.float16)), hessian)
    assert found < 0.8 * objective(w, rounding, hessian)
    shuffled = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))
    wrong = awq(w, moments(hessian[shuffled][:, shuffled]), form, torch.float16)
    assert objective(w, dequantised(*wrong), hessian) > 1.2 * found, "the control: another matrix's inputs"
    if form.group_size:
        assert objective(w, dequantised(*gptq(w, moments(hessian), form, torch.float16)), hessian) < found


def test_factors_follow_the_inputs_size():
    _, hessian = problem()
    size = np.sqrt(np.diag(hessian.double().numpy()))
    size = np.maximum(size, 0.01 * size.mean())  # the channel that is never used
    found = factors(moments(hessian), 0.35).double().numpy()
    assert np.allclose(found / found[0], (size / size[0]) ** 0.35, rtol=1e-5)
    assert found.max() * found.min() == pytest.approx(1, rel=1e-5)
    assert (factors(moments(hessian), 0.0) == 1).all()
    assert (factors(moments(0 * hessian), 0.5) == 1).all(), "texts that use no channel"


@each_form
def test_a_group_s_scale_and_zero_leave_its_products_the_least_error(form):
    w, hessian = problem()
    exact, h = w.double().numpy(), hessian.double().numpy()
    size = form.group_size or CHANNELS

    def error(values):
        """The sum of the errors of the groups' own products."""
        parts = [slice(start, start + size) for start in range(0, CHANNELS, size)]
        return sum(error_of((exact - np.asarray(values, np.float64))[:, part], h[part, part]) for part in parts)

    def on(grid):
        return dequantised(nearest(w, grid, form), grid)

    grid = search_grid(w, hessian, form)
    assert error(on(grid)) == pytest.approx(error(clipped(exact, h, form)), rel=1e-3)
    assert error(on(grid)) < 0.95 * error(on(search_grid(w, hessian.diagonal(), form))), "the control: channels apart"
    assert error(on(grid)) < 0.9 * error(on(replace(grid, scale=grid.scale * 1.1))), "the control: scales nearby"


@pytest.mark.cuda
@each_form
def test_a_gpu_finds_the_same(form):
    w, hessian = problem(rows=96)
    (q, grid), (on_gpu, gpu_grid) = (
        awq(w.to(on), moments(hessian.to(on)), form, torch.float16) for on in ("cpu", "cuda")
    )
    assert torch.allclose(grid.factor, gpu_grid.factor.cpu(), rtol=1e-5)
    assert (q == on_gpu.cpu()).float().mean() > 0.97  # a sum in another order, and a group takes another clipping
    errors = [objective(w, dequantised(*each).cpu(), hessian) for each in ((q, grid), (on_gpu, gpu_grid))]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_what_is_not_finite_is_refused():
    w, hessian = problem()
    with pytest.raises(CheckpointError, match="weight is not finite"):
        awq(w * torch.inf, moments(hessian), FORM, torch.float16)
    with pytest.raises(CheckpointError, match="activation is not finite"):
        awq(w, moments(hessian * torch.nan), FORM, torch.float16)
