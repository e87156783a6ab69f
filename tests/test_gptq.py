"""GPTQ against its definition in NumPy and float64, and layer by layer against hooks on the transformers model."""

import numpy as np
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_checkpoint, make_samples, make_tensors
from test_calibrate import HUB_LINEARS

from baichuan.calibration.weight_only import quantise_layers
from baichuan.config import WeightOnly
from baichuan.errors import CheckpointError
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.quant.gptq import DAMPING, RANGES, dequantised, gptq, search_grid
from baichuan.quant.weight_only import dequantise, quantise_int4, quantise_int8
from baichuan.records import Int4Weight, Int8Weight

CHANNELS = 64
FORM = WeightOnly("int4", 32)


def problem(rows=24, tokens=300, seed=0):
    """A matrix, and inputs whose channels differ in size and follow one another."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((CHANNELS, CHANNELS)) + 2 * np.eye(CHANNELS)
    x = rng.standard_normal((tokens, CHANNELS)) @ mixed * rng.gamma(1, 1, CHANNELS)
    x[:, 5] = 0  # an input that the texts never use
    w = rng.standard_normal((rows, CHANNELS)) * rng.gamma(1, 1, (rows, 1))
    w[3] = 0
    return torch.from_numpy(w).float(), torch.from_numpy(x.T @ x / tokens).float()


def objective(w, values, hessian):
    """The error that GPTQ makes small, in float64: sum over rows of (w - v) H (w - v)ᵀ."""
    left = w.double().numpy() - np.asarray(values, np.float64)
    return float(np.einsum("ri,ij,rj->", left, hessian.double().numpy(), left))


def defined(w, hessian, grid, group_size, bits):
    """Integers by the definition: each column in turn is rounded from the value that is best given those before it,
    which comes from the normal equations of all columns that are left."""
    h = hessian.double().numpy().copy()
    order = np.argsort(-np.diag(h), kind="stable")
    h += np.eye(len(h)) * DAMPING * np.trace(h) / len(h)
    w, scale = w.double().numpy(), np.repeat(grid.scale.double().numpy(), group_size, 1)
    zero = 0 * scale if grid.zero is None else np.repeat(grid.zero.double().numpy(), group_size, 1)
    q, changed = np.zeros_like(w), np.zeros_like(w)  # changed: w - v of the columns that are done
    for place, column in enumerate(order):
        done, left = order[:place], order[place:]
        moved = np.linalg.solve(h[np.ix_(left, left)], h[np.ix_(left, done)] @ changed[:, done].T)[0]
        best = w[:, column] + moved
        with np.errstate(invalid="ignore", divide="ignore"):
            quotient = np.where(scale[:, column] == 0, 0, best / scale[:, column])
        q[:, column] = np.clip(np.rint(quotient) + zero[:, column], *RANGES[bits])
        changed[:, column] = w[:, column] - (q[:, column] - zero[:, column]) * scale[:, column]
    return q


FORMS = {
    "int4 in groups of 32": WeightOnly("int4", 32, symmetric=True),
    "int4 in groups of 64 with zeros": WeightOnly("int4", 64),
    "int4 in groups of 32 with zeros": WeightOnly("int4", 32),
    "int4": WeightOnly("int4", symmetric=True),
    "int8": WeightOnly("int8"),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_integers_are_those_of_the_definition(form):
    w, hessian = problem()
    group_size = form.group_size or CHANNELS
    q, grid = gptq(w, hessian, form, torch.float16)
    assert q.dtype == torch.int8 and grid.scale.shape == (len(w), CHANNELS // group_size)
    assert RANGES[form.bits][0] <= q.min() and q.max() <= RANGES[form.bits][1]
    expected = defined(w, hessian, grid, group_size, form.bits)
    # float32 may round a value halfway between two integers to the other one, and columns after it follow
    assert (q.numpy() == expected).mean() > 0.98
    ours = objective(w, dequantised(q, grid), hessian)
    assert ours == pytest.approx(objective(w, dequantised(torch.from_numpy(expected), grid), hessian), rel=0.02)
    assert not dequantised(q, grid)[3].any() and torch.isfinite(grid.scale).all()


@each_form
def test_the_error_is_far_below_rounding_s_and_needs_the_right_hessian(form):
    w, hessian = problem()
    rounded = Int8Weight(*quantise_int8(w))
    if form.precision == "int4":
        rounded = Int4Weight(*quantise_int4(w, form.group_size, torch.float16))
    rounding = objective(w, dequantise(rounded), hessian)
    assert objective(w, dequantised(*gptq(w, hessian, form, torch.float32)), hessian) < 0.6 * rounding
    shuffled = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))
    wrong = gptq(w, hessian[shuffled][:, shuffled], form, torch.float32)
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


def test_what_is_not_finite_is_refused():
    w, hessian = problem()
    with pytest.raises(CheckpointError, match="weight is not finite"):
        gptq(w.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.nan)), hessian, FORM, torch.float16)
    with pytest.raises(CheckpointError, match="activation is not finite"):
        gptq(w, hessian * torch.inf, FORM, torch.float16)


def found_integers(model, samples, folder, form=FORM):
    """(integers, grid) by layer and linear."""
    found = {}
    quantise_layers(
        make_checkpoint(model),
        model,
        samples,
        folder,
        "cpu",
        form,
        lambda layer, name, q, grid: found.__setitem__((layer, name), (q, grid)),
    )
    return found


@pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)
def test_inputs_come_through_the_quantised_linears_before(model, tmp_path):
    """Each linear's Hessian by hooks on the transformers model, whose linears before it have the quantised weights."""
    samples = make_samples(model)
    found = found_integers(model, samples, tmp_path)
    hf = BaichuanForCausalLM(BaichuanConfig.of(model)).eval()
    tensors = {name: torch.from_numpy(tensor) for name, tensor in make_tensors(model).items()}
    hf.load_state_dict(tensors)
    modules = dict(hf.named_modules())
    for (layer, name), (q, grid) in found.items():
        hubs = [f"model.layers.{layer}.{hub}" for hub in HUB_LINEARS[name]]
        weight = torch.cat([tensors[f"{hub}.weight"] for hub in hubs])
        expected = gptq(weight, inputs_squared(hf, modules[hubs[0]], samples), FORM, torch.float16)
        assert (q == expected[0]).float().mean() > 0.99  # sums in another order
        rows = dequantised(q, grid).split([len(tensors[f"{hub}.weight"]) for hub in hubs])
        for hub, values in zip(hubs, rows, strict=True):
            modules[hub].weight.data = values
    hf.load_state_dict(tensors)
    unquantised = inputs_squared(hf, modules[hubs[0]], samples)
    wrong = gptq(weight, unquantised, FORM, torch.float16)[0]
    assert (q == wrong).float().mean() < 0.99, "the control: inputs through the linears before as they were"
    assert list(tmp_path.iterdir()) == [], "the hidden states are deleted"


def inputs_squared(hf, module, samples):
    seen = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].detach().flatten(0, -2)))
    with torch.inference_mode():
        for sample in samples:
            hf(torch.tensor([sample]))
    handle.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_the_same_texts_give_the_same_integers(tmp_path):
    one, other = (found_integers(ROTARY, make_samples(ROTARY), tmp_path) for _ in range(2))
    assert all(torch.equal(one[key][0], other[key][0]) for key in one)
    assert all(torch.equal(one[key][1].scale, other[key][1].scale) for key in one)
    different = found_integers(ROTARY, make_samples(ROTARY, seed=1), tmp_path)
    assert not torch.equal(one[1, "qkv"][0], different[1, "qkv"][0]), "the negative control"
