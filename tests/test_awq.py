"""AWQ against its definition in NumPy and float64; folded factors against the transformers model, and in a folder."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_checkpoint, make_samples
from test_calibrate import HUB_LINEARS
from test_gptq import CHANNELS, FORM, inputs_of, moments, moments_of, objective, problem
from test_weight_only_ranks import reassembled

import weight
from baichuan.calibration.calibrate import calibrate
from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.calibration.weight_only import quantise_layers
from baichuan.config import QuantConfig, WeightOnly
from baichuan.engine.self_check import all_logits
from baichuan.errors import CheckpointError, ConfigError
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.quant.awq import EXPONENTS, awq, factors
from baichuan.quant.gptq import gptq
from baichuan.quant.grid import dequantised, nearest, search_grid
from baichuan.quant.weight_only import dequantise, pack_int4, quantise_int4
from baichuan.records import Int4Weight
from baichuan.weights.folded import folded
from baichuan.weights.rank_tensors import in_memory

FORMS = {
    "groups of 32": WeightOnly("int4", 32, symmetric=True),
    "groups of 32 with zeros": WeightOnly("int4", 32),
    "groups of 64 with zeros": WeightOnly("int4", 64),
    "rows": WeightOnly("int4", symmetric=True),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_model = pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)


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


def found_by_awq(model, samples, folder, form=FORM):
    """(integers, grid) by layer and linear, the factors of each layer, and the folded model's ranges."""
    found = {}

    def write(layer, name, q, grid):
        found[layer, name] = q, grid

    factors, ranges = quantise_layers(make_checkpoint(model), model, samples, folder, "cpu", form, "awq", write)
    return found, factors, ranges


def hf_model(model, checkpoint):
    hf = BaichuanForCausalLM(BaichuanConfig.of(model)).eval()
    hf.load_state_dict({name: source.read(0, source.shape[0]).clone() for name, source in checkpoint.items()})
    return hf


def logits_of(hf, sample):
    with torch.inference_mode():
        return hf(torch.tensor([sample])).logits[0]


@each_model
def test_the_folded_model_is_the_same_model(model):
    """Any factors, on the transformers model; and each of what comes before a linear, not folded."""
    [sample] = make_samples(model, count=1)
    checkpoint, rng = make_checkpoint(model), np.random.default_rng(0)
    widths = {"qkv": model.hidden_size, "o_proj": model.hidden_size, "gate_up": model.hidden_size}
    widths |= {"down_proj": model.intermediate_size}
    layers = [
        {name: rng.uniform(0.5, 2, width).astype(np.float32) for name, width in widths.items()}
        for _ in range(model.num_layers)
    ]
    exact, changed = logits_of(hf_model(model, checkpoint), sample), folded(checkpoint, layers)
    size = exact.abs().max()
    assert (logits_of(hf_model(model, changed), sample) - exact).abs().max() < 1e-5 * size
    without = {
        "input_layernorm": checkpoint,
        "self_attn.W_pack": folded(checkpoint, [{}, {"qkv": layers[1]["qkv"]}]),
        "post_attention_layernorm": checkpoint,
        "mlp.up_proj": folded(checkpoint, [{}, {"gate_up": layers[1]["gate_up"]}]),
    }
    for module, unfolded in without.items():
        name = f"model.layers.1.{module}.weight"
        wrong = logits_of(hf_model(model, {**changed, name: unfolded[name]}), sample)
        assert (wrong - exact).abs().max() > 1e-2 * size, f"the control: {module} not folded"


@each_model
def test_inputs_come_through_the_quantised_linears_before(model, tmp_path):
    """Each linear's inputs by hooks on a transformers model that is folded, and quantised up to there."""
    samples = make_samples(model)
    found, layers, _ = found_by_awq(model, samples, tmp_path)
    checkpoint = make_checkpoint(model)
    hf = hf_model(model, folded(checkpoint, layers))
    for (layer, name), (q, grid) in found.items():
        hubs = [f"model.layers.{layer}.{hub}" for hub in HUB_LINEARS[name]]
        sources = [checkpoint[f"{hub}.weight"] for hub in hubs]
        weight = torch.cat([source.read(0, source.shape[0]) for source in sources])
        x = inputs_of(hf, hubs[0], samples) * layers[layer][name]
        expected, its_grid = awq(weight, moments_of(x, x), FORM, torch.float16)
        assert np.allclose(its_grid.factor, layers[layer][name], rtol=1e-3)  # float16 scales are rounded again
        assert (q == expected).float().mean() > 0.99  # sums in another order
        rows = dequantised(q, grid).split([source.shape[0] for source in sources])
        for hub, values in zip(hubs, rows, strict=True):
            hf.get_submodule(hub).weight.data = values
    again, same, _ = found_by_awq(model, samples, tmp_path)
    assert all(torch.equal(q, again[key][0]) for key, (q, _) in found.items()), "the same texts give the same integers"
    assert all(np.array_equal(layers[1][name], same[1][name]) for name in HUB_LINEARS)
    assert list(tmp_path.iterdir()) == [], "the hidden states are deleted"


@each_model
def test_the_ranges_are_those_of_the_folded_model(model, tmp_path):
    samples, checkpoint = make_samples(model), make_checkpoint(model)
    _, layers, ranges = found_by_awq(model, samples, tmp_path)
    expected, unfolded = (
        calibrate(each, model, samples, tmp_path, "cpu") for each in (folded(checkpoint, layers), checkpoint)
    )
    for ours, theirs, wrong in zip(ranges, expected, unfolded, strict=True):
        assert (ours.k, ours.v) == pytest.approx((theirs.k, theirs.v), rel=1e-4)
        assert abs(wrong.v / theirs.v - 1) > 1e-2, "the control"
        for name, seen in theirs.linears.items():
            for field in ("x", "y"):
                values = getattr(ours.linears[name], field), getattr(seen, field)
                torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, msg=name)  # sums of other numbers
        changed = [(wrong.linears[name].x / seen.x - 1).abs().max() for name, seen in theirs.linears.items()]
        assert max(changed) > 1e-2, "the control"


MODEL = replace(ROTARY, intermediate_size=128)
LAST_ROWS = {"qkv": "o_proj", "gate_up": "down_proj"}  # v's and up's make the inputs of these


def converted(folder, tp_size, **how):
    form = WeightOnly("int4", 32)
    request = ConvertRequest(
        folder, MODEL, partial(make_checkpoint, MODEL), tp_size, processes=1, weight_only=form, method="awq", **how
    )
    return convert(request, make_samples(MODEL), {})


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_folder_holds_the_folded_model_and_its_integers(tmp_path, tp_size):
    found, layers, _ = found_by_awq(MODEL, make_samples(MODEL), tmp_path)
    source = weight.WeightSource(binary_folder=converted(tmp_path, tp_size))
    model, quant = replace(MODEL, dtype="float32"), QuantConfig("int4", 32, zero_points=True, kv_cache="int8")
    ranks = [in_memory(weight.rank_tensors(source, model, quant, rank, tp_size)) for rank in range(tp_size)]
    exact = folded(make_checkpoint(MODEL), layers)
    for (layer, name), (q, grid) in found.items():
        for field, expected in (("packed", pack_int4(q)), ("scale", grid.scale.float()), ("zero", grid.zero)):
            assert torch.equal(reassembled(ranks, f"layers.{layer}.{name}", field, True), expected), (layer, name)
    ranges = calibrate(exact, MODEL, make_samples(MODEL), tmp_path, "cpu")
    for layer in range(MODEL.num_layers):
        for field, hub in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")):
            expected = exact[f"model.layers.{layer}.{hub}.weight"].read(0, MODEL.hidden_size)
            for tensors in ranks:
                assert torch.equal(tensors[f"layers.{layer}.{field}"], expected)
        assert ranks[0][f"layers.{layer}.v_scale"].item() == pytest.approx(ranges[layer].v / 127)


def test_an_engine_computes_what_the_integers_stand_for(tmp_path):
    """The INT4 engine is the original model with other matrices: the integers' values, each column over its factor."""
    [sample] = make_samples(MODEL, count=1)
    folder = converted(tmp_path, 1)
    found, layers, _ = found_by_awq(MODEL, make_samples(MODEL), tmp_path)

    def engine(quant):
        source = weight.WeightSource(binary_folder=folder)
        return all_logits(ReferenceExecutor(MODEL, quant, weight.load_rank(source, MODEL, quant)), sample)

    original = hf_model(MODEL, make_checkpoint(MODEL))
    exact = logits_of(original, sample)
    size = exact.abs().max()
    assert (engine(QuantConfig()) - exact).abs().max() < 1e-5 * size, "in floats the folder is the original"
    for (layer, name), (q, grid) in found.items():
        values = dequantised(q, grid) / torch.from_numpy(layers[layer][name])
        if name in LAST_ROWS:
            factor = torch.from_numpy(layers[layer][LAST_ROWS[name]])
            values[-len(factor) :] *= factor[:, None]
        parts = values.chunk(len(HUB_LINEARS[name]))
        for hub, part in zip(HUB_LINEARS[name], parts, strict=True):
            original.get_submodule(f"model.layers.{layer}.{hub}").weight.data = part
    quantised = logits_of(original, sample)
    assert (engine(QuantConfig("int4", 32, zero_points=True)) - quantised).abs().max() < 1e-4 * size
    assert (quantised - exact).abs().max() > 1e-2 * size, "the control: the integers are no floats"


@pytest.mark.parametrize("how", [{"weight_only": FORM, "method": "awq"}, {"weight_only": FORM}, {"alpha": "auto"}])
def test_the_texts_go_through_one_loading_of_each_layer(tmp_path, caplog, how):
    caplog.set_level(logging.INFO)
    read = []

    def watched(name, source):
        return replace(source, read=lambda start, stop: read.append(name) or source.read(start, stop))

    checkpoint = {name: watched(name, source) for name, source in make_checkpoint(MODEL).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baichuan.calibration.convert._write_all", lambda *_: [])  # what else reads the weights
        patch.setattr("baichuan.calibration.convert._fp8_scales", lambda *_: [])
        convert(ConvertRequest(tmp_path, MODEL, lambda: checkpoint, **how), make_samples(MODEL), {})
    linears = [name for name in read if "proj" in name or "W_pack" in name]
    assert sorted(linears) == sorted(name for name in checkpoint if "proj" in name or "W_pack" in name)
    assert sum("calibrating on" in record.message for record in caplog.records) == 1


def test_int8_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="awq finds INT4 weights and INT8 is asked for; use gptq"):
        ConvertRequest(tmp_path, MODEL, make_checkpoint, weight_only=WeightOnly("int8"), method="awq")
    with pytest.raises(ConfigError, match="weight_only_method"):
        ConvertRequest(tmp_path, MODEL, make_checkpoint, weight_only=FORM, method="gptq2")
