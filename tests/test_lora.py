"""LoRA adapters that PEFT wrote, merged while the checkpoint is read, against PEFT's own merge."""

from __future__ import annotations

import csv
import json
import shutil
from functools import cache

import peft
import pytest
import scripts
import torch
from goldens import checkpoint
from safetensors.torch import load_file, save_file
from tiny_engine import SAMPLES

import build
import hf_baichuan_convert
import run
import summarize
import weight
from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError, ConfigError
from baichuan.hf_model.modeling import load_hf_model
from baichuan.quant.weight_only import quantise_int8
from baichuan.weights.hub.adapter import open_merged, resolve_adapter
from baichuan.weights.hub.config_json import read_model_config

ALL = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "attention": dict(r=4, lora_alpha=16, target_modules=["W_pack", "o_proj"]),
    "every matrix": dict(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=ALL,
        rank_pattern={"W_pack": 2, "model.layers.1.mlp.down_proj": 8},
        alpha_pattern={"down_proj": 3, "^model.layers.0.mlp.up_proj": 12},
    ),
    "saved whole": dict(r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head", "input_layernorm"]),
    "embedding": dict(r=4, target_modules=["embed_tokens", "gate_proj"]),
}
IDS = torch.tensor([[5, 17, 300, 42, 9, 11, 730, 2, 8, 1]])
TOLERANCE = 1e-5  # relative to the largest logit: PEFT adds in float32, and sums in another order


@cache
def base(version):
    return load_hf_model(checkpoint(version), version)


def logits(model):
    with torch.inference_mode():
        return model.eval()(IDS).logits[0]


def make_adapter(folder, version, seed=0, safetensors=True, **settings):
    """An adapter by PEFT whose every tensor is random."""
    model = peft.get_peft_model(load_hf_model(checkpoint(version), version), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, safe_serialization=safetensors)
    return folder


def merged_by_peft(version, *adapters):
    model = load_hf_model(checkpoint(version), version)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("lora"), "v2_13b", **ADAPTERS["every matrix"])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("version", ["v1_7b", "v2_13b"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_merging_equals_pefts(name, version, tmp_path):
    make_adapter(tmp_path, version, **ADAPTERS[name])
    expected = logits(merged_by_peft(version, tmp_path))
    found = logits(load_hf_model(checkpoint(version), version, adapters=[tmp_path]))
    size = expected.abs().max()
    assert (found - expected).abs().max() <= TOLERANCE * size
    assert (found - logits(base(version))).abs().max() > 1000 * TOLERANCE * size


def test_a_bin_file_and_a_second_adapter(adapter, tmp_path):
    second = make_adapter(tmp_path / "second", "v2_13b", seed=1, **ADAPTERS["attention"])
    torch.save(load_file(second / "adapter_model.safetensors"), second / "adapter_model.bin")
    expected = logits(merged_by_peft("v2_13b", adapter, second))
    (second / "adapter_model.safetensors").unlink()
    found = logits(load_hf_model(checkpoint("v2_13b"), "v2_13b", adapters=[adapter, second]))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_lora_on_a_head_that_is_not_normalised(tmp_path):
    make_adapter(tmp_path, "v1_7b", r=2, target_modules=["lm_head"])
    expected = logits(merged_by_peft("v1_7b", tmp_path))
    found = logits(load_hf_model(checkpoint("v1_7b"), "v1_7b", adapters=[tmp_path]))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    make_adapter(tmp_path / "v2", "v2_13b", r=2, target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match="v2_13b normalises lm_head's rows"):
        load_hf_model(checkpoint("v2_13b"), "v2_13b", adapters=[tmp_path / "v2"])


def test_blocks_of_any_size_give_the_same_rows(adapter):
    model = read_model_config(checkpoint("v2_13b"), "v2_13b", "float32")
    merged = open_merged(checkpoint("v2_13b"), model, [adapter])
    for name in ("model.layers.0.self_attn.W_pack.weight", "model.layers.1.mlp.down_proj.weight"):
        source = merged[name]
        whole = source.read(0, source.shape[0])
        for step in (1, 7, 64):
            parts = [source.read(a, min(a + step, len(whole))) for a in range(0, len(whole), step)]
            assert torch.cat(parts).equal(whole)


def test_weights_are_quantised_after_merging(adapter):
    expected = merged_by_peft("v2_13b", adapter).state_dict()["model.layers.1.self_attn.o_proj.weight"]
    integers, scale = quantise_int8(expected)
    model = read_model_config(checkpoint("v2_13b"), "v2_13b", "float32")
    source = weight.WeightSource(checkpoint("v2_13b"), adapters=(adapter,))
    found = weight.load_rank(source, model, QuantConfig("int8")).layers[1].o_proj
    torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0)
    assert (found.weight != integers).float().mean() < 1e-3  # float32 sums in another order may round to a neighbour
    unmerged = weight.load_rank(weight.WeightSource(checkpoint("v2_13b")), model, QuantConfig("int8")).layers[1].o_proj
    assert (unmerged.weight != integers).float().mean() > 0.5


def test_the_commands(adapter, tmp_path, capsys):
    """build.py, then run.py: the same tokens as PEFT's merged model."""
    with torch.inference_mode():
        model = merged_by_peft("v2_13b", adapter)
        expected = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=-1)[0].tolist()
    engine, ids, out = tmp_path / "engine", tmp_path / "ids.csv", tmp_path / "out.csv"
    ids.write_text(",".join(map(str, IDS[0].tolist())))
    given = ["--model_version", "v2_13b", "--model_dir", str(checkpoint("v2_13b")), "--lora_dir", str(adapter)]
    limits = ["--dtype", "float32", "--max_input_len", "32", "--max_output_len", "8", "--output_dir", str(engine)]
    assert build.main([*given, *limits]) == 0
    said = capsys.readouterr().err
    assert "matrices changed" in said
    assert float(said.split("mean KL ")[1].split()[0]) < 1e-6  # the self-check's model has the adapter too
    flags = ["--engine_dir", str(engine), "--input_tokens", str(ids), "--output_csv", str(out), "--max_output_len", "8"]
    flags += ["--top_k", "1", "--repetition_penalty", "1"]
    assert run.main(flags) == 0
    [row] = csv.reader(out.read_text().splitlines())
    assert [int(cell) for cell in row if cell] == expected


def test_the_converter_and_summarize_merge_too(adapter, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"article": SAMPLES[0].article, "highlights": "No bridge."}) + "\n")
    source, lora = str(checkpoint("v2_13b")), ["--lora_dir", str(adapter)]
    flags = ["-i", source, *lora, "-o", str(tmp_path / "bin"), "-kv", "--calib_dataset", str(texts)]
    assert hf_baichuan_convert.main([*flags, "--model_version", "v2_13b"]) == 0
    engine, folder = str(tmp_path / "engine"), str(tmp_path / "bin/1-gpu")
    limits = ["--dtype", "float32", "--max_input_len", "64", "--max_output_len", "8"]
    assert build.main(["--bin_model_dir", folder, *limits, "--output_dir", engine]) == 0
    sides = ["--test_trt_llm", "--engine_dir", engine, "--test_hf", "--hf_model_dir", source, "--data_type", "fp32"]
    data = ["--dataset_path", str(texts), "--output_len", "8", "--max_ite", "1"]
    capsys.readouterr()
    for given, agrees in ((lora, True), ([], False)):
        assert summarize.main([*sides, *given, *data]) == 0
        assert ("1 of 1 summaries are identical" in capsys.readouterr().out) == agrees


def test_a_flag_without_its_checkpoint_is_refused(adapter, tmp_path, capsys):
    lora = ["--lora_dir", str(adapter)]
    scripts.refused(build.main, ["--bin_model_dir", str(tmp_path), *lora], "needs the checkpoint", capsys)
    scripts.refused(summarize.main, ["--test_trt_llm", *lora], "--lora_dir is for --test_hf", capsys)
    missing = ["--model_dir", str(checkpoint("v2_13b")), "--lora_dir", str(tmp_path)]
    scripts.refused(build.main, missing, "has no adapter_config.json", capsys)
    with pytest.raises(ConfigError, match="needs the checkpoint"):
        weight.WeightSource(adapters=(adapter,))
    assert resolve_adapter(str(adapter)) == adapter


# ---------------------------------------------------------------- what is refused


def changed(adapter, folder, settings=None, tensors=None):
    """A copy of the adapter with some settings, and with its tensors as tensors(by name) makes them."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (settings or {})))
    if tensors:
        save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; only 'LORA'"),
        ({"use_dora": True}, "sets use_dora to 'True'"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "sets layers_to_transform"),
        ({"trainable_token_indices": [5]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"a_setting_of_tomorrow": "x"}, "sets a_setting_of_tomorrow to 'x'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changed the base"),
        ({"r": 0}, "r '0', which is no rank"),
        ({"r": "4"}, "r '4', which is no rank"),
        ({"lora_alpha": None}, "lora_alpha 'None', which is no scale"),
        ({"lora_alpha": 1e300}, "is no scale"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"'\(a\+\)\+\$' in rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern that is no object"),
        ({"alpha_pattern": {"W_pack": "x"}}, "alpha_pattern of W_pack 'x'"),
        ({"rank_pattern": {}}, "instead of"),
        ({"target_modules": ["W_pack"]}, "holds a change of .* do not name it"),
        ({"target_modules": [*ALL, "lm_head"]}, "lacks a change of lm_head"),
    ],
)
def test_settings_that_are_not_merged_are_refused_by_name(adapter, settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_hf_model(checkpoint("v2_13b"), "v2_13b", adapters=[changed(adapter, tmp_path, settings)])


A = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without(A), "lacks model.layers.0.self_attn.o_proj's lora_A"),
        (without(A.replace("lora_A", "lora_B")), "lacks model.layers.0.self_attn.o_proj's lora_B"),
        (with_tensor(A, torch.zeros(4, 7)), r"of shape \(4, 7\) instead of"),
        (with_tensor(A, torch.zeros(4, 7, dtype=torch.int8)), "no float type"),
        (with_tensor(A.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(2)), "lora_magnitude_vector"),
        (with_tensor(A.replace("lora_A.weight", "lora_B.bias"), torch.zeros(2)), r"lora_B\.bias"),
        (with_tensor(A.replace("layers.0", "layers.9"), torch.zeros(2)), r"layers\.9.*no part of a plain LoRA"),
        (with_tensor("model.norm.weight", torch.zeros(2)), "no part of a plain LoRA"),
        (with_tensor("base_model.model.model.norm.lora_A.weight", torch.zeros(2)), "lacks model.norm's lora_B"),
        (with_tensor("base_model.model.lm_head.weight", torch.zeros(7, 2)), "shape"),
        (lambda tensors: {}, "holds no tensors"),
    ],
)
def test_damaged_weights_are_refused(adapter, tensors, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_hf_model(checkpoint("v2_13b"), "v2_13b", adapters=[changed(adapter, tmp_path, {}, tensors)])


def test_what_one_adapter_changed_is_not_thrown_away(tmp_path):
    first = make_adapter(tmp_path / "a", "v1_7b", r=2, target_modules=["lm_head"])
    second = make_adapter(tmp_path / "b", "v1_7b", r=2, target_modules=["o_proj"], modules_to_save=["lm_head"])
    third = make_adapter(tmp_path / "c", "v1_7b", r=2, target_modules=["o_proj"])
    load_hf_model(checkpoint("v1_7b"), "v1_7b", adapters=[third, second, third])
    with pytest.raises(CheckpointError, match="b replaces lm_head.weight, which .*a has changed already"):
        load_hf_model(checkpoint("v1_7b"), "v1_7b", adapters=[first, second])


def test_a_folder_without_its_weights_is_refused(adapter, tmp_path):
    folder = changed(adapter, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has none of adapter_model\.safetensors, adapter_model\.bin"):
        load_hf_model(checkpoint("v2_13b"), "v2_13b", adapters=[folder])
