"""AWQ layer by layer: the folded model against the transformers model, and what a binary folder and its engine hold."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from binary_models import ALIBI, ROTARY, make_checkpoint, make_samples
from calibration_problems import FORM, inputs_of, moments_of
from test_calibrate import HUB_LINEARS
from test_weight_only_ranks import reassembled

import weight
from baichuan.calibration.calibrate import calibrate
from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.calibration.weight_only import quantise_layers
from baichuan.config import QuantConfig, WeightOnly
from baichuan.engine.self_check import all_logits
from baichuan.errors import ConfigError
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.quant.awq import awq
from baichuan.quant.grid import dequantised
from baichuan.quant.weight_only import pack_int4
from baichuan.weights.folded import folded
from baichuan.weights.rank_tensors import in_memory

each_model = pytest.mark.parametrize("model", [ROTARY, ALIBI], ids=lambda model: model.model_version)


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
