"""Every array of the binary folder against its formula in NumPy, in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from binary_models import ROTARY, make_checkpoint, make_tensors

from baichuan.errors import CheckpointError
from baichuan.quant.ranges import LayerRanges, LinearRange
from baichuan.weights.binary.layout import STORAGE_DTYPES, Layout
from baichuan.weights.binary.write import BinaryWriter
from baichuan.weights.shard import LINEARS

HIDDEN, INTER = ROTARY.hidden_size, ROTARY.intermediate_size
LINEAR_INPUTS = {"qkv": HIDDEN, "o_proj": HIDDEN, "gate_up": HIDDEN, "down_proj": INTER}
LINEAR_OUTPUTS = {"qkv": 3 * HIDDEN, "o_proj": HIDDEN, "gate_up": 2 * INTER, "down_proj": HIDDEN}
K_ABSMAX, V_ABSMAX = 7.5, 3.25


def some_ranges(seed=1) -> LayerRanges:
    rng = np.random.default_rng(seed)

    def gamma(size):
        return torch.from_numpy(rng.gamma(0.7, 2, size).astype(np.float32)) + 1e-3

    linears = {name: LinearRange(gamma(LINEAR_INPUTS[name]), gamma(LINEAR_OUTPUTS[name])) for name in LINEARS}
    linears["qkv"].y[:HIDDEN] *= 100  # q is far larger than k and v
    return LayerRanges(linears, K_ABSMAX, V_ABSMAX)


def write(folder, alpha, tp_size, storage="fp32"):
    layout = Layout(ROTARY, tp_size, STORAGE_DTYPES[storage])
    writer = BinaryWriter(partial(make_checkpoint, ROTARY), layout, folder, alpha)
    for layer in range(ROTARY.num_layers):
        for name in LINEARS:
            writer.write_linear(layer, name, some_ranges(layer))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        writer.write_global(name)
    return layout


NAMES = {  # the hub's name: (the folder's, the linear that it belongs to)
    "self_attn.W_pack": ("attention.query_key_value", "qkv"),
    "self_attn.o_proj": ("attention.dense", "o_proj"),
    "mlp.gate_proj": ("mlp.fc", "gate_up"),
    "mlp.up_proj": ("mlp.gate", "gate_up"),
    "mlp.down_proj": ("mlp.proj", "down_proj"),
}


def expected(layer, alpha, tp_size) -> dict[str, np.ndarray]:
    """One layer's files by name, straight from the format's description, in float64."""
    prefix = f"model.layers.{layer}."
    tensors = {
        name.removeprefix(prefix).removesuffix(".weight"): tensor.astype(np.float64)
        for name, tensor in make_tensors(ROTARY).items()
        if name.startswith(prefix)
    }
    ranges = some_ranges(layer)
    smoothers = expected_smoothers(tensors, ranges, alpha)
    files = {
        "input_layernorm.weight.bin": tensors["input_layernorm"] / smoothers["qkv"],
        "post_layernorm.weight.bin": tensors["post_attention_layernorm"] / smoothers["gate_up"],
        "attention.query_key_value.scale_k_quant_orig.bin": K_ABSMAX / 127,
        "attention.query_key_value.scale_v_quant_orig.bin": V_ABSMAX / 127,
    }
    outputs = {linear: ranges.linears[linear].y.double().numpy() for linear in LINEARS}
    outputs["mlp.gate_proj"], outputs["mlp.up_proj"] = np.split(outputs["gate_up"], 2)
    for hub, (_, linear) in NAMES.items():
        x, y = ranges.linears[linear].x.double().numpy(), outputs.get(hub, outputs[linear])
        files |= expected_matrix(hub, tensors[hub], smoothers[linear], x, y, alpha, tp_size)
    return {prefix + name: values for name, values in files.items()}


def expected_smoothers(tensors, ranges, alpha) -> dict[str, np.ndarray]:
    """What each linear's inputs are divided by: ones without an alpha."""
    smoothers = {}
    for linear in LINEARS:
        weights = [tensors[hub] for hub, (_, of) in NAMES.items() if of == linear]
        x = ranges.linears[linear].x.double().numpy()
        largest = np.max([np.abs(w).max(0) for w in weights], axis=0)
        smoothers[linear] = np.ones_like(x) if alpha is None else np.maximum(x**alpha / largest ** (1 - alpha), 1e-5)
    return smoothers


def expected_matrix(hub, w, smoother, x, y, alpha, tp_size) -> dict[str, np.ndarray]:
    """The files of one of the hub's matrices, whose inputs and outputs reach x and y."""
    files, base = {}, NAMES[hub][0]
    w = (w * smoother).T  # [in, out]
    if hub == "self_attn.W_pack":
        w, y = w.reshape(HIDDEN, 3, HIDDEN), y.reshape(3, HIDDEN)[1:]  # k and v alone
    splits_out = hub not in ("self_attn.o_proj", "mlp.down_proj")

    def split(name, values, axis=-1 if splits_out else 0):
        for rank, share in enumerate(np.split(values, tp_size, axis=axis)):
            files[f"{base}.{name}.{rank}.bin"] = share

    split("weight", w)
    if not splits_out and alpha is not None:
        split("smoother", smoother, 0)
    if alpha is None and hub != "self_attn.W_pack":
        return files
    per_channel = 127 / np.abs(w).max(0)  # [3, hidden] or [out]
    per_tensor = np.broadcast_to(per_channel.min(-1, keepdims=True), per_channel.shape)
    x_scale, y_scale = 127 / (x / smoother).max(), 127 / y.max()
    files[f"{base}.scale_x_orig_quant.bin"] = x_scale
    files[f"{base}.scale_y_quant_orig.bin"] = 1 / y_scale
    for column, scale in (("", per_tensor), (".col", per_channel)):
        split(f"weight.int8{column}", np.clip(np.round(w * scale), -127, 127).astype(np.int8))
        for name, values in (("scale_w_quant_orig", 1 / scale), ("scale_y_accum_quant", y_scale / (x_scale * scale))):
            if hub == "self_attn.W_pack" or (column and splits_out):
                split(name + column, values, -1)
            else:
                files[f"{base}.{name}{column}.bin"] = values if column else values[:1]
    return files


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 0.8, 1.0])
def test_every_array_has_its_formula(tmp_path, alpha, tp_size):
    layout = write(tmp_path, alpha, tp_size)
    expect = {}
    for layer in range(ROTARY.num_layers):
        expect |= expected(layer, alpha, tp_size)
    tensors = make_tensors(ROTARY)
    expect["vocab_embedding.weight.bin"] = tensors["model.embed_tokens.weight"]
    expect["ln_f.weight.bin"] = tensors["model.norm.weight"]
    expect["lm_head.weight.bin"] = tensors["lm_head.weight"]
    assert {path.name for path in tmp_path.iterdir()} == set(expect)
    assert {array.name for array in layout.written(alpha is not None)} == set(expect)
    for name, values in expect.items():
        values = np.asarray(values)
        if values.dtype == np.int8:
            stored = np.fromfile(tmp_path / name, np.int8)
            assert stored.size == values.size, name
            different = np.abs(stored.astype(int) - values.ravel())
            # float32 products may fall on the other side of a half; that is one value in some ten thousand
            assert different.max() <= 1 and different.mean() < 1e-3, name
        else:
            stored = np.fromfile(tmp_path / name, "<f4")
            np.testing.assert_allclose(stored, values.ravel(), rtol=3e-6, atol=1e-30, err_msg=name)


def test_a_wrong_strength_is_seen(tmp_path):
    """The negative control: files for another alpha are far from the formula's values."""
    write(tmp_path, 0.5, 1)
    other = expected(0, 0.8, 1)
    for name in ("attention.dense.smoother.0", "attention.query_key_value.scale_w_quant_orig.col.0", "mlp.fc.weight.0"):
        name = f"model.layers.0.{name}.bin"
        stored = np.fromfile(tmp_path / name, "<f4")
        assert np.abs(stored / other[name].ravel() - 1).max() > 0.1, name
    name = "model.layers.0.mlp.proj.weight.int8.col.0.bin"
    assert (np.fromfile(tmp_path / name, np.int8) != other[name].ravel()).mean() > 0.5


def test_half_precision_storage(tmp_path):
    write(tmp_path, 0.5, 1, "fp16")
    name = "model.layers.1.mlp.fc.weight.0.bin"
    stored = np.fromfile(tmp_path / name, "<f2")
    np.testing.assert_array_equal(stored, expected(1, 0.5, 1)[name].astype(np.float32).astype("<f2").ravel())
    assert (tmp_path / "model.layers.0.mlp.proj.smoother.0.bin").stat().st_size == 4 * INTER


def test_float16_overflow_and_damaged_weights_are_named(tmp_path):
    def checkpoint(value):
        made = make_checkpoint(ROTARY)
        made["model.layers.0.mlp.down_proj.weight"].read(0, 1)[0, 5] = value
        return made

    layout = Layout(ROTARY, 1, STORAGE_DTYPES["fp16"])
    with pytest.raises(
        CheckpointError, match="mlp.down_proj has values beyond float16's 65504; use --storage-type fp32"
    ):
        BinaryWriter(partial(checkpoint, 1e6), layout, tmp_path, None).write_linear(0, "down_proj", some_ranges())
    with pytest.raises(CheckpointError, match="not finite"):
        BinaryWriter(partial(checkpoint, np.nan), layout, tmp_path, 0.5).write_linear(0, "down_proj", some_ranges())
