"""GPTQ against its definition in NumPy and float64, and layer by layer against hooks on the transformers model."""

import numpy as np
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_samples, make_tensors
from calibration_problems import (
    CHANNELS,
    FORM,
    TOKENS,
    found_integers,
    inputs_of,
    moments,
    moments_of,
    objective,
    problem,
)
from test_calibrate import HUB_LINEARS

from baichuan.config import WeightOnly
from baichuan.errors import CheckpointError
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.quant.gptq import COMPENSATED, DAMPING, compensating, descended, gptq, rescaled, rounded, shrunk
from baichuan.quant.grid import RANGES, dequantised, search_grid
from baichuan.quant.moments import InputMoments
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import Int4Weight, Int8Weight


def damped(hessian, tokens):
    """What the error is measured by, in float64: products of different inputs shrink, the diagonal grows."""
    h = hessian.double().numpy()
    kept = tokens / (tokens + len(h))
    return h * kept + np.diag(np.diag(h) * (1 - kept) + DAMPING * np.trace(h) / len(h))


def defined(w, h, grid, group_size, bits):
    """GPTQ's integers by the definition: each column in turn is rounded from the value that is best given those before
    it, which comes from the normal equations of all columns that are left."""
    order = np.argsort(-np.diag(h), kind="stable")
    w, (scale, zero) = w.double().numpy(), columns_of(grid, group_size)
    q, changed = np.zeros_like(w), np.zeros_like(w)  # changed: w - v of the columns that are done
    for place, column in enumerate(order):
        done, left = order[:place], order[place:]
        moved = np.linalg.solve(h[np.ix_(left, left)], h[np.ix_(left, done)] @ changed[:, done].T)[0]
        q[:, column] = to_integers(w[:, column] + moved, scale[:, column], zero[:, column], bits)
        changed[:, column] = w[:, column] - (q[:, column] - zero[:, column]) * scale[:, column]
    return q


def descended_by_definition(w, h, q, grid, group_size, bits):
    """Each integer in turn the one of least error, found by trying them all."""
    w, (scale, zero) = w.double().numpy(), columns_of(grid, group_size)
    values = (q - zero) * scale
    candidates = np.arange(RANGES[bits][0], RANGES[bits][1] + 1)
    q = q.copy()
    for column in range(w.shape[1]):
        errors = []
        for candidate in candidates:
            values[:, column] = (candidate - zero[:, column]) * scale[:, column]
            errors.append(np.einsum("ri,ij,rj->r", w - values, h, w - values))
        q[:, column] = np.where(scale[:, column] == 0, q[:, column], candidates[np.argmin(errors, 0)])
        values[:, column] = (q[:, column] - zero[:, column]) * scale[:, column]
    return q


def columns_of(grid, group_size):
    """Scale and zero of every column, in float64."""
    scale = np.repeat(grid.scale.double().numpy(), group_size, 1)
    return scale, 0 * scale if grid.zero is None else np.repeat(grid.zero.double().numpy(), group_size, 1)


def to_integers(values, scale, zero, bits):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(np.rint(np.where(scale == 0, 0, values / scale)) + zero, *RANGES[bits])


FORMS = {
    "int4 in groups of 32": WeightOnly("int4", 32, symmetric=True),
    "int4 in groups of 64 with zeros": WeightOnly("int4", 64),
    "int4 in groups of 32 with zeros": WeightOnly("int4", 32),
    "int4": WeightOnly("int4", symmetric=True),
    "int8": WeightOnly("int8"),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_each_step_s_integers_are_those_of_its_definition(form):
    """float32 may round a value halfway between two integers to the other one, and columns after it follow."""
    w, hessian = problem()
    group_size, h = form.group_size or CHANNELS, damped(hessian, TOKENS)
    ours = shrunk(hessian, TOKENS)
    assert np.allclose(ours, h, rtol=1e-6)
    grid = search_grid(w, ours.inverse().diagonal().reciprocal(), form)
    q = rounded(w, ours, ours.double().inverse(), grid, form)
    assert_alike(q, defined(w, h, grid, group_size, form.bits), w, h, grid)
    lower = descended(w, ours, q, grid, form)
    expected = descended_by_definition(w, h, q.double().numpy(), grid, group_size, form.bits)
    assert_alike(lower, expected, w, h, grid)
    assert not torch.equal(lower, q), "the control: GPTQ left something to gain"


def assert_alike(q, expected, w, h, grid):
    assert (q.numpy() == expected).mean() > 0.98
    errors = [objective(w, dequantised(each, grid), torch.from_numpy(h)) for each in (q, torch.from_numpy(expected))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@each_form
def test_scales_are_the_best_for_their_integers(form):
    """After many rounds each row's scales solve the normal equations of the row, by NumPy's least squares."""
    w, hessian = problem()
    group_size, ours, h = form.group_size or CHANNELS, shrunk(hessian, TOKENS), damped(hessian, TOKENS)
    grid = search_grid(w, ours.diagonal(), form)
    q = rounded(w, ours, ours.double().inverse(), grid, form)
    start = objective(w, dequantised(q, grid), torch.from_numpy(h))
    once = rescaled(w, ours, q, grid)
    assert objective(w, dequantised(q, once), torch.from_numpy(h)) < start
    for _ in range(50):
        grid = rescaled(w, ours, q, grid)
    root = np.linalg.cholesky(h).T  # |root d| squared is d H d
    steps = q.double().numpy() - columns_of(grid, group_size)[1]
    for row in (0, 1, 7):
        of_groups = np.zeros((CHANNELS, CHANNELS // group_size))
        of_groups[np.arange(CHANNELS), np.arange(CHANNELS) // group_size] = steps[row]
        best = np.linalg.lstsq(root @ of_groups, root @ w[row].double().numpy(), rcond=None)[0]
        assert np.allclose(grid.scale[row], best, rtol=1e-3)


@each_form
def test_what_comes_out_is_integers_in_range_and_scales_that_are_finite(form):
    w, hessian = problem()
    q, grid = gptq(w, moments(hessian), form, torch.float16)
    assert q.dtype == torch.int8 and grid.scale.shape == (len(w), CHANNELS // (form.group_size or CHANNELS))
    assert RANGES[form.bits][0] <= q.min() and q.max() <= RANGES[form.bits][1]
    assert not dequantised(q, grid)[3].any() and torch.isfinite(grid.scale).all()
    h, plain = damped(hessian, TOKENS), search_grid(w, hessian.diagonal(), form)
    alone = defined(w, h, plain, form.group_size or CHANNELS, form.bits)
    ours, theirs = (dequantised(*each) for each in ((q, grid), (torch.from_numpy(alone), plain)))
    assert objective(w, ours, torch.from_numpy(h)) < 0.97 * objective(w, theirs, torch.from_numpy(h)), "GPTQ alone"


@each_form
def test_the_error_is_far_below_rounding_s_and_needs_the_right_hessian(form):
    w, hessian = problem()
    rounded = Int8Weight(*quantise_int8(w))
    if form.precision == "int4":
        rounded = Int4Weight(*quantise_int4(w, form.group_size, torch.float16))
    rounding = objective(w, dequantise(rounded), hessian)
    assert objective(w, dequantised(*gptq(w, moments(hessian), form, torch.float32)), hessian) < 0.6 * rounding
    shuffled = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))
    wrong = gptq(w, moments(hessian[shuffled][:, shuffled]), form, torch.float32)
    assert objective(w, dequantised(*wrong), hessian) > rounding, "the control: another matrix's inputs"


@pytest.mark.parametrize("zeros", [False, True])
def test_scales_and_zeros_leave_less_weighted_error_than_any_other_clipping(zeros):
    w, hessian = problem()
    importance = hessian.diagonal()
    grid = search_grid(w, importance, WeightOnly("int4", 32, not zeros))
    groups = w.unflatten(1, (-1, 32))

    def errors(scale, zero):
        q = ((groups / torch.where(scale == 0, torch.inf, scale)[..., None]).round() + zero[..., None]).clamp(-8, 7)
        return ((groups - (q - zero[..., None]) * scale[..., None]).square() * importance.view(1, -1, 32)).sum(-1)

    largest, bottom, top = groups.abs().amax(-1), groups.amin(-1), groups.amax(-1)
    none = torch.zeros_like(largest)
    tried = [errors(largest / limit, none) for limit in (6, 7, 7.5, 8, 9, 10, -6, -7, -7.5, -8, -9, -10)]
    if zeros:
        step = (top - bottom).clamp(min=1e-9) / 15
        tried = [errors(step * part, (-8 - bottom / step).round().clamp(-16, 16)) for part in (0.8, 0.9, 1, 1.1)]
        assert grid.zero.abs().max() > 0 and grid.zero.dtype == torch.int8
    found = errors(grid.scale, none if grid.zero is None else grid.zero)
    # the best scale for its integers, not only a good one
    assert found.sum() < 0.97 * torch.stack(tried).amin(0).sum()
    wrong = errors(grid.scale * 1.1, none if grid.zero is None else grid.zero)
    assert wrong.sum() > 1.1 * found.sum(), "the control: scales nearby are worse"


def drifted(tokens=20_000):
    """(matrix, inputs x, what the model of floats has in their place), the difference being no chance."""
    w, _ = problem()
    rng = np.random.default_rng(2)
    e = rng.standard_normal((tokens, CHANNELS)) @ (rng.standard_normal((CHANNELS, CHANNELS)) / 8 + np.eye(CHANNELS))
    x = e @ (np.eye(CHANNELS) + rng.standard_normal((CHANNELS, CHANNELS)) / 40) + rng.standard_normal(e.shape) / 20
    return w, x, e


def test_the_matrix_that_makes_up_for_its_inputs_is_ridge_regression_s():
    """The reference is NumPy's least squares: W e from x, and a penalty of the damping on what is changed."""
    w, x, e = drifted()
    known = moments_of(x, e)
    inverse = shrunk(known.squares, len(x)).double().inverse()
    penalty = np.sqrt(DAMPING * np.square(x).mean() * len(x)) * np.eye(CHANNELS)
    exact = w.double().numpy()
    best = np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([e @ exact.T, penalty @ exact.T]), rcond=None)[0].T
    change = COMPENSATED * (best - exact)
    # 20,000 tokens shrink products of different inputs by 0.3 %
    assert np.linalg.norm(compensating(w, known, inverse).numpy() - exact - change) < 0.05 * np.linalg.norm(change)
    assert np.linalg.norm(change) > 0.03 * np.linalg.norm(exact), "the control: there is something to make up for"


@each_form
def test_integers_that_make_up_for_their_inputs_give_what_the_floats_give(form):
    w, x, e = drifted()
    expected, known = e @ w.double().numpy().T, moments_of(x, e)

    def error(inputs):
        return np.square(expected - x @ dequantised(*gptq(w, inputs, form, torch.float32)).double().numpy().T).sum()

    assert error(known) < 0.9 * error(moments(known.squares, len(x)))
    wrong = InputMoments(known.squares, -known.drift, len(x))
    assert error(wrong) > error(moments(known.squares, len(x))), "the control: made up for the wrong way"


def test_groups_of_128_calibrated_are_better_than_groups_of_32_rounded():
    rng = np.random.default_rng(0)
    mixed = (rng.standard_normal((256, 256)) / 16 + np.eye(256)) * rng.gamma(1, 1, 256)
    x = torch.from_numpy(rng.standard_normal((2000, 256)) @ mixed).float()
    w, hessian = torch.from_numpy(rng.standard_normal((48, 256))).float(), x.T @ x / len(x)
    found = gptq(w, moments(hessian, len(x)), WeightOnly("int4", 128), torch.float16)
    nearest = dequantise(Int4Weight(*quantise_int4(w, 32, torch.float16)))
    assert objective(w, dequantised(*found), hessian) < 0.8 * objective(w, nearest, hessian)


@pytest.mark.cuda
@each_form
def test_a_gpu_finds_the_same(form):
    """The matrix has several blocks, so that they are replayed, and a shorter last one."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((2000, 320)) @ rng.standard_normal((320, 320))).float()
    w, hessian = torch.from_numpy(rng.standard_normal((96, 320))).float(), x.T @ x / len(x)
    (q, grid), (on_gpu, gpu_grid) = (
        gptq(w.to(on), moments(hessian.to(on), 2000), form, torch.float16) for on in ("cpu", "cuda")
    )
    assert (q == on_gpu.cpu()).float().mean() > 0.9  # sums in another order, and what follows from a tie
    errors = [objective(w, dequantised(*each).cpu(), hessian) for each in ((q, grid), (on_gpu, gpu_grid))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_what_is_not_finite_is_refused():
    w, hessian = problem()
    with pytest.raises(CheckpointError, match="weight is not finite"):
        spoilt = w.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan))
        gptq(spoilt, moments(hessian), FORM, torch.float16)
    with pytest.raises(CheckpointError, match="activation is not finite"):
        gptq(w, moments(hessian * torch.inf), FORM, torch.float16)


@pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
def test_inputs_come_through_the_quantised_linears_before(model, tmp_path):
    """Each linear's inputs by hooks on two transformers models, of which one has quantised weights in the linears
    before."""
    samples = make_samples(model)
    found = found_integers(model, samples, tmp_path)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in make_tensors(model).items()}
    exact, quantised = (BaichuanForCausalLM(BaichuanConfig.of(model)).eval() for _ in range(2))
    for each in (exact, quantised):
        each.load_state_dict(tensors)
    for (layer, name), (q, grid) in found.items():
        hubs = [f"model.layers.{layer}.{hub}" for hub in HUB_LINEARS[name]]
        weight = torch.cat([tensors[f"{hub}.weight"] for hub in hubs])
        x, e = (inputs_of(hf, hubs[0], samples) for hf in (quantised, exact))
        expected = gptq(weight, moments_of(x, e), FORM, torch.float16)
        assert (q == expected[0]).float().mean() > 0.99  # sums in another order
        rows = dequantised(q, grid).split([len(tensors[f"{hub}.weight"]) for hub in hubs])
        for hub, values in zip(hubs, rows, strict=True):
            quantised.get_submodule(hub).weight.data = values
    for control, inputs in (("the linears before as they were", (e, e)), ("nothing to make up for", (x, x))):
        wrong = gptq(weight, moments_of(*inputs), FORM, torch.float16)[0]
        assert (q == wrong).float().mean() < 0.99, f"the control: {control}"
    assert list(tmp_path.iterdir()) == [], "the hidden states are deleted"


def test_the_same_texts_give_the_same_integers(tmp_path):
    one, other = (found_integers(ROTARY, make_samples(ROTARY), tmp_path) for _ in range(2))
    assert all(torch.equal(one[key][0], other[key][0]) for key in one)
    assert all(torch.equal(one[key][1].scale, other[key][1].scale) for key in one)
    different = found_integers(ROTARY, make_samples(ROTARY, seed=1), tmp_path)
    assert not torch.equal(one[1, "qkv"][0], different[1, "qkv"][0]), "the negative control"
