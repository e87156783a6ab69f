"""Checkpoints that other tools quantised in a way that is not known, or that are damaged: each is refused by name."""

from __future__ import annotations

import pytest
import torch
from imported_folders import LAYER, changed, dense, model_of

import weight
from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError
from baichuan.quant.weight_only import quantise_int4
from baichuan.weights.hub.checkpoint import open_checkpoint


def group(**changes):
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
    return {"group_0": {"weights": weights | changes}}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq_v1_sym", {"quant_method": "hqq"}, "quantised by hqq, and only those by gptq, awq"),
        ("gptq_v1_sym", {"quant_method": ["gptq"]}, r"quantised by \['gptq'\]"),
        ("gptq_v1_sym", {"bits": 3}, "bits to '3' and only 4, 8"),
        ("gptq_v1_sym", {"bits": True}, "bits to 'True'"),
        ("gptq_v1_sym", {"group_size": 1024}, "group_size to '1024'"),
        ("gptq_v1_sym", {"checkpoint_format": "marlin"}, "checkpoint_format to 'marlin'"),
        ("gptq_v1_sym", {"pack_dtype": "int64"}, "pack_dtype"),
        ("gptq_v1_sym", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic, other settings for some matrices"),
        ("awq", {"version": "gemv"}, "version to 'gemv' and only gemm"),
        ("awq", {"bits": 8}, "bits to '8' and only 4"),
        ("compressed_sym", {"format": "marlin-24"}, "format to 'marlin-24' and only pack-quantized"),
        ("compressed_sym", {"kv_cache_scheme": {"num_bits": 8}}, "sets kv_cache_scheme"),
        ("compressed_sym", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format to 'sparse-24-bitmask'"),
        ("compressed_sym", {"config_groups": {}}, "no config_groups"),
        ("compressed_sym", {"config_groups": {"a": {"weights": None}}}, "config_groups without weights"),
        ("compressed_sym", {"config_groups": group(type="float")}, "type to 'float' and only int"),
        ("compressed_sym", {"config_groups": group(strategy="tensor")}, "strategy to 'tensor'"),
        ("compressed_sym", {"config_groups": group(num_bits=2)}, "num_bits to '2'"),
        (
            "compressed_sym",
            {"config_groups": {"a": {"weights": {}, "input_activations": {"num_bits": 8}}}},
            "quantises input_activations",
        ),
        ("bitsandbytes_nf4", {"load_in_8bit": True}, "load_in_4bit and load_in_8bit alike"),
    ],
)
def test_other_variants_are_refused_by_name(name, settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        model_of(changed(name, tmp_path, settings))


Q = f"{LAYER}mlp.down_proj."


def with_tensor(end, value):
    return lambda tensors: tensors | {Q + end: value}


def without(end):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != Q + end}


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("gptq_v1_sym", without("qzeros"), r"has model.layers.0.mlp.down_proj quantised and lacks its qzeros"),
        ("gptq_ordered", without("g_idx"), "lacks its g_idx"),
        ("gptq_ordered", with_tensor("g_idx", torch.full((192,), 6, dtype=torch.int32)), "does not name a group"),
        ("gptq_v1_sym", with_tensor("qweight", torch.zeros(24, 63, dtype=torch.int32)), r"shape \(24, 63\)"),
        ("gptq_v1_sym", with_tensor("scales", torch.zeros(6, 128, dtype=torch.int32)), "scales is int32"),
        ("gptq_v1_sym", with_tensor("bias", torch.ones(128)), "has a bias for model.layers.0.mlp.down_proj"),
        ("awq", with_tensor("bias", torch.tensor(0.0)), "has a bias for model.layers.0.mlp.down_proj"),
        (
            "gptq_v1_sym",
            with_tensor("qzeros", torch.zeros(6, 16, dtype=torch.int32)),
            "quantization_config says sym",
        ),
        ("gptq_v1_sym", with_tensor("scales", torch.full((6, 128), torch.inf)), "not finite"),
        ("awq", without("scales"), "lacks its scales"),
        ("compressed_sym", with_tensor("weight_shape", torch.tensor([128, 191])), r"weight_shape says \(128, 191\)"),
        ("compressed_zeros", without("weight_zero_point"), "lacks its weight_zero_point"),
        ("bitsandbytes_nf4", without(STATE), "without one readable quant_state"),
        ("bitsandbytes_nf4", with_tensor(STATE, torch.zeros(9, dtype=torch.uint8)), "is no JSON object"),
        ("bitsandbytes_nf4", with_tensor(STATE, torch.zeros(5000, dtype=torch.uint8)), "without one readable"),
        ("bitsandbytes_nf4", with_tensor(STATE, torch.tensor(123, dtype=torch.uint8)), "without one readable"),
        ("bitsandbytes_nf4", with_tensor(STATE, torch.zeros(1, 9, dtype=torch.uint8)), "without one readable"),
        ("bitsandbytes_nf4", with_tensor("weight.quant_map", torch.full((16,), torch.nan)), "not finite"),
        ("bitsandbytes_nf4", without("weight.nested_quant_map"), "lacks its weight.nested_quant_map"),
        ("bitsandbytes_int8", without("SCB"), "lacks its SCB"),
        ("awq", with_tensor("g_idx", torch.zeros(2)), "holds .*g_idx"),
    ],
)
def test_damaged_parts_are_refused_by_name(name, tensors, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        dense(changed(name, tmp_path, {}, tensors))


def test_a_bias_of_zeros_is_none(tmp_path):
    dense(changed("gptq_v1_sym", tmp_path, {}, with_tensor("bias", torch.zeros(128))))


def test_matrices_that_the_tool_left_are_read_too(tmp_path):
    plain = torch.randn(128, 192).half()

    def left(tensors):
        return {name: each for name, each in tensors.items() if not name.startswith(Q)} | {Q + "weight": plain}

    folder = changed("gptq_v1_sym", tmp_path, {}, left)
    checkpoint = open_checkpoint(folder, model_of(folder))
    assert checkpoint[Q + "weight"].read(0, 128).equal(plain)
    weights = weight.load_rank(weight.WeightSource(folder), model_of(folder), QuantConfig("int4", 32)).layers[0]
    packed, scale = quantise_int4(plain, 32, torch.float32)
    assert weights.down_proj.packed.equal(packed) and weights.down_proj.scale.equal(scale)
