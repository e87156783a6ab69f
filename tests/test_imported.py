"""Checkpoints that GPTQModel, AutoAWQ, compressed-tensors and bitsandbytes wrote (tests/data/imported/make.py): read as
the tools themselves read them, and unpacked independently in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from baichuan.errors import CheckpointError
from baichuan.weights.hub.checkpoint import open_checkpoint
from baichuan.weights.hub.config_json import read_model_config

FOLDER = Path(__file__).parent / "data/imported"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
LAYER = "model.layers.0."
MATRICES = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Of the largest output: the tools multiply by scales in float16, or round the dense weights to it (2^-11 each).
TOLERANCE = 1e-3


def model_of(folder):
    return read_model_config(folder, "v1_7b", "float32")


def dense(folder, block=7):
    """Every quantised matrix as it is read, block of rows by block of rows."""
    checkpoint = open_checkpoint(folder, model_of(folder))
    found = {}
    for module in MATRICES:
        source = checkpoint[f"{LAYER}{module}.weight"]
        blocks = range(0, source.shape[0], block)
        found[module] = torch.cat([source.read(a, min(a + block, source.shape[0])) for a in blocks])
        assert found[module].dtype == source.dtype == torch.float32
    return found


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_what_the_tool_computes_with(name):
    outputs = load_file(FOLDER / name / "outputs.safetensors")
    for module, weight in dense(FOLDER / name).items():
        x, expected = outputs[f"{module}.x"], outputs[f"{module}.y"]
        assert (x @ weight.t() - expected).abs().max() <= TOLERANCE * expected.abs().max(), module
        assert (x @ weight.roll(1, 1).t() - expected).abs().max() > 0.1 * expected.abs().max()


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
    for module, weight in dense(FOLDER / name).items():
        prefix = f"{LAYER}{module}."
        parts = {key.removeprefix(prefix): part for key, part in stored.items() if key.startswith(prefix)}
        expected = UNPACKED[settings["quant_method"]](parts, settings, weight.shape[1])
        # Three roundings of float32: the absmax's product and sum, and the last product.
        np.testing.assert_allclose(weight.double().numpy(), expected, rtol=2e-7, atol=1e-9)


def test_every_kind_is_here():
    assert len(NAMES) == 11
    zeros = load_file(FOLDER / "gptq_v1_zeros/model.safetensors")[f"{LAYER}self_attn.W_pack.qzeros"]
    assert (bits_of(zeros, 4, 1) == 15).any()  # a zero of 0 borrows from its neighbour in the first version
