"""Checkpoints that GPTQModel, AutoAWQ, compressed-tensors and bitsandbytes wrote (tests/data/imported/make.py): read as
the tools themselves read them, and unpacked independently in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from imported_folders import FOLDER, LAYER, MATRICES, changed, dense, model_of
from safetensors.torch import load_file

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint

NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
# Of the largest output: the tools multiply by scales in float16, or round the dense weights to it (2^-11 each).
TOLERANCE = 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_what_the_tool_computes_with(name):
    outputs = load_file(FOLDER / name / "outputs.safetensors")
    for module, found in dense(FOLDER / name).items():
        x, expected = outputs[f"{module}.x"], outputs[f"{module}.y"]
        assert (x @ found.t() - expected).abs().max() <= TOLERANCE * expected.abs().max(), module
        assert (x @ found.roll(1, 1).t() - expected).abs().max() > 0.1 * expected.abs().max()


def bits_of(words, bits, axis):
    """The packed integers, in float64: [..., n, ...] int32 -> [..., n * 32 / bits, ...]"""
    words = np.moveaxis(words.numpy().view(np.uint32), axis, -1)
    values = np.stack([(words >> np.uint32(shift)) & np.uint32(2**bits - 1) for shift in range(0, 32, bits)], -1)
    return np.moveaxis(values.reshape(*words.shape[:-1], -1), -1, axis).astype(np.float64)


def by_gptq(parts, settings, size):
    bits = settings["bits"]
    zeros = parts["qzeros"].numpy().view(np.uint32).copy()
    if settings["checkpoint_format"] == "gptq":
        zeros += np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    q, z = bits_of(parts["qweight"], bits, 0), bits_of(torch.from_numpy(zeros.view(np.int32)), bits, 1)
    groups = parts["g_idx"].numpy()
    return ((q - z[groups]) * parts["scales"].double().numpy()[groups]).T


def by_awq(parts, settings, size):
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # output channels of a word from its lowest bits

    def columns(words):
        values = bits_of(words, 4, 1)
        return values.reshape(values.shape[0], -1, 8)[:, :, order].reshape(values.shape)

    groups = np.arange(size) // settings["group_size"]
    q, z = columns(parts["qweight"]), columns(parts["qzeros"])
    return ((q - z[groups]) * parts["scales"].double().numpy()[groups]).T


def by_compressed_tensors(parts, settings, size):
    weights = settings["config_groups"]["group_0"]["weights"]
    q, scale = bits_of(parts["weight_packed"], weights["num_bits"], 1), parts["weight_scale"].double().numpy()
    z = np.full(scale.shape, 2.0 ** (weights["num_bits"] - 1))
    if not weights["symmetric"]:
        z = bits_of(parts["weight_zero_point"], weights["num_bits"], 0)
    groups = np.arange(size) // (weights["group_size"] or size)
    return (q - z[:, groups]) * scale[:, groups]


def by_bitsandbytes(parts, settings, size):
    if settings["load_in_8bit"]:
        return parts["weight"].double().numpy() * parts["SCB"].double().numpy()[:, None] / 127
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = parts["weight.nested_quant_map"].double().numpy()[parts["weight.absmax"].long().numpy()]
    blocks = np.arange(absmax.size) // state["nested_blocksize"]
    absmax = absmax * parts["weight.nested_absmax"].double().numpy()[blocks] + state["nested_offset"]
    octets = parts["weight"].numpy().ravel()
    indices = np.stack([octets >> 4, octets & 15], -1).ravel()
    scales = absmax[np.arange(indices.size) // state["blocksize"]]
    return (parts["weight.quant_map"].double().numpy()[indices] * scales).reshape(-1, size)


UNPACKED = {
    "gptq": by_gptq,
    "awq": by_awq,
    "compressed-tensors": by_compressed_tensors,
    "bitsandbytes": by_bitsandbytes,
}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_equal_an_independent_unpacking(name):
    settings = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    stored = load_file(FOLDER / name / "model.safetensors")
    for module, found in dense(FOLDER / name).items():
        prefix = f"{LAYER}{module}."
        parts = {key.removeprefix(prefix): part for key, part in stored.items() if key.startswith(prefix)}
        expected = UNPACKED[settings["quant_method"]](parts, settings, found.shape[1])
        # Three roundings of float32: the absmax's product and sum, and the last product.
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-7, atol=1e-9)


def test_compressed_tensors_in_the_order_of_activations(tmp_path):
    """No tool here writes weight_g_idx on a CPU: the group of each input channel is set, and the integers stay."""
    orders = {module: torch.randperm(MATRIX_COLUMNS[module]).int() // 32 for module in MATRICES}

    def ordered(tensors):
        return tensors | {f"{LAYER}{module}.weight_g_idx": order for module, order in orders.items()}

    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "actorder": "group"}
    folder = changed("compressed_sym", tmp_path, {"config_groups": {"group_0": {"weights": weights}}}, ordered)
    stored = load_file(folder / "model.safetensors")
    for module, found in dense(folder).items():
        q = bits_of(stored[f"{LAYER}{module}.weight_packed"], 4, 1) - 8
        scale = stored[f"{LAYER}{module}.weight_scale"].double().numpy()
        np.testing.assert_allclose(found.double().numpy(), q * scale[:, orders[module].numpy()], rtol=2e-7)
        assert open_checkpoint(folder, model_of(folder))[f"{LAYER}{module}.weight"].int4 is None


MATRIX_COLUMNS = dict.fromkeys(MATRICES, 128) | {"mlp.down_proj": 192}


def test_every_kind_is_here():
    assert len(NAMES) == 11
    zeros = load_file(FOLDER / "gptq_v1_zeros/model.safetensors")[f"{LAYER}self_attn.W_pack.qzeros"]
    assert (bits_of(zeros, 4, 1) == 15).any()  # a zero of 0 borrows from its neighbour in the first version


def with_lists(tensors):
    """bitsandbytes' tensors as Baichuan2-*-Chat-4bits pickles them, by its quantizer.py and bitsandbytes 0.41."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".quant_state.bitsandbytes__nf4"):
            found |= {} if ".weight." in name else {name: tensor}
            continue
        state, weight_name = json.loads(bytes(tensor.tolist())), name.removesuffix(".quant_state.bitsandbytes__nf4")
        part = {end: tensors[f"{weight_name}.{end}"] for end in ("absmax", "quant_map", *NESTED)}
        nested = [part[NESTED[0]], part[NESTED[1]], state["nested_blocksize"], False, torch.float32, None, None]
        found[f"{weight_name}.quant_state"] = [
            *(part["absmax"], torch.Size(state["shape"]), torch.float16, state["blocksize"]),
            *([torch.tensor(state["nested_offset"]), nested], "nf4", part["quant_map"]),
        ]
        found[f"{weight_name}.data"] = tensors[weight_name]
        del found[weight_name]
    return found


NESTED = ("nested_absmax", "nested_quant_map")
SETTINGS_OF_BAICHUAN = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "load_in_8bit": False}


def listed(folder, change=lambda values: values):
    """bitsandbytes_nf4 as Baichuan2-*-Chat-4bits is stored; its values as change(by name) makes them."""
    values = json.loads((FOLDER / "bitsandbytes_nf4/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": SETTINGS_OF_BAICHUAN}))
    torch.save(
        change(with_lists(load_file(FOLDER / "bitsandbytes_nf4/model.safetensors"))), folder / "pytorch_model.bin"
    )
    return folder


def test_baichuans_own_form_of_four_bits_is_read(tmp_path):
    expected = dense(FOLDER / "bitsandbytes_nf4")
    for module, found in dense(listed(tmp_path)).items():
        assert found.equal(expected[module])


def doubled(times: int = 60) -> tuple:
    """A small pickle whose value would take for ever to print."""
    value: tuple = ()
    for _ in range(times):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[:6],
        lambda state: [*state[:5], "int8", state[6]],
        lambda state: [3.0, *state[1:]],
        lambda state: [*state[:4], [torch.zeros(3), state[4][1]], *state[5:]],
        lambda state: [*state[:4], [state[4][0], 7], *state[5:]],
        lambda state: [state[0], (64, 10**12), *state[2:]],
        lambda state: [*state[:3], doubled(), *state[4:]],
        lambda state: [*state[:5], doubled(), state[6]],
        lambda state: [state[0], (64, doubled()), *state[2:]],
    ],
)
@pytest.mark.timeout(20)
def test_a_damaged_list_is_refused(change, tmp_path):
    name = f"{LAYER}self_attn.o_proj.weight.quant_state"
    with pytest.raises(CheckpointError, match="damaged|quant_state says shape"):
        dense(listed(tmp_path, lambda values: values | {name: change(values[name])}))
