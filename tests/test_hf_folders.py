"""The transformers model in folders: what it saves, what Auto classes read, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import goldens
import pytest
import torch
from goldens import FLOAT32_TOLERANCE
from hf_models import SMALL, ids, logits, model, small
from transformers import AutoConfig, AutoModelForCausalLM

from baichuan.config import PRESETS, VERSIONS
from baichuan.errors import BaichuanError, CheckpointError, ConfigError
from baichuan.hf_model import modeling as hf
from baichuan.hf_model.modeling import BaichuanConfig, load_hf_model
from baichuan.weights.shard import hub_shapes


@pytest.mark.parametrize("version", VERSIONS)
def test_saving_writes_the_hub_format_and_auto_classes_read_it(version, tmp_path):
    hf.register()
    tiny = small(version)
    tiny.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["architectures"] == [VERSIONS[version].architecture]
    assert {key for key in values if "max_" in key} == set(VERSIONS[version].length_keys)
    assert {name: tuple(each.shape) for name, each in tiny.state_dict().items()} == hub_shapes(
        replace(PRESETS[version], **SMALL)
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_version == version
    assert logits(again, torch.arange(9)[None]).equal(logits(tiny, torch.arange(9)[None]))


def test_the_folders_code_is_not_run(tmp_path):
    hf.register()
    shutil.copytree(goldens.checkpoint("v1_7b"), tmp_path / "hub")
    (tmp_path / "hub").chmod(0o755)
    for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
        (tmp_path / "hub" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "auto_map" in json.loads((tmp_path / "hub/config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    expected = goldens.golden("v1_7b")["logits_33"]
    assert (logits(loaded, ids("v1_7b", 33))[0] - expected).abs().max() <= FLOAT32_TOLERANCE
    assert not (tmp_path / "ran").exists() and not hasattr(loaded.config, "auto_map")


def test_another_programs_keys_in_the_configuration_change_nothing(tmp_path):
    """Such as the engine's names for the sizes, which transformers sets as attributes."""
    hf.register()
    folder = shutil.copytree(goldens.checkpoint("v1_7b"), tmp_path / "hub", copy_function=shutil.copyfile)
    values = json.loads((folder / "config.json").read_text())
    foreign = {"num_layers": 1, "num_heads": 2, "model": "x", "head_dim": 3}
    (folder / "config.json").write_text(json.dumps(values | foreign))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = goldens.golden("v1_7b")["logits_7"]
    assert (logits(loaded, ids("v1_7b", 7))[0] - expected).abs().max() <= FLOAT32_TOLERANCE


def test_the_version_must_be_known_and_fit():
    hf.register()
    folder = goldens.checkpoint("v2_13b")
    with pytest.raises(ConfigError, match="fits v1_13b and v2_13b; give the model_version"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="contradicts model_version v1_7b: architectures .* length in model_max"):
        AutoModelForCausalLM.from_pretrained(folder, model_version="v1_7b")
    loaded = AutoModelForCausalLM.from_pretrained(folder, model_version="v2_13b", dtype=torch.float32)
    assert logits(loaded, ids("v2_13b", 7)).equal(logits(model("v2_13b"), ids("v2_13b", 7)))
    assert AutoConfig.from_pretrained(goldens.checkpoint("v1_7b")).model_version == "v1_7b"


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    tiny = small("v1_7b")
    state = tiny.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    tiny.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight; download"):
        load_hf_model(tmp_path, "v1_7b")


@pytest.mark.parametrize(
    "settings, message", [({"hidden_act": "gelu"}, "hidden_act"), ({"rope_scaling": {"type": "yarn"}}, "rope_scaling")]
)
def test_other_architectures_are_refused(settings, message):
    with pytest.raises(BaichuanError, match=message):
        BaichuanConfig(**settings)
