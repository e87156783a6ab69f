"""The transformers model that is read straight to a GPU is the one that from_pretrained makes."""

import json

import hub_folders
import pytest
import torch

from baichuan.errors import CheckpointError
from baichuan.hf_model.modeling import load_hf_model

pytestmark = pytest.mark.cuda


@pytest.fixture(params=[("v1_7b", "safetensors", 0), ("v1_7b", "safetensors", 2), ("v2_13b", "bin", 2)], ids=str)
def checkpoint(request, tmp_path):
    version, form, shards = request.param
    config = hub_folders.small_config(version)
    (tmp_path / "config.json").write_text(json.dumps(hub_folders.hub_values(config)))
    hub_folders.write_weights(tmp_path, hub_folders.tensors(config), form, shards)
    return version, tmp_path


def test_both_ways_give_one_model(checkpoint):
    version, folder = checkpoint
    ids = torch.tensor([[3, 7, 11, 20, 5]])
    on_cpu, on_gpu = load_hf_model(folder, version), load_hf_model(folder, version, "float32", "cuda")
    with torch.inference_mode():
        expected, logits = on_cpu(ids).logits, on_gpu(ids.cuda()).logits.cpu()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32, sums in another order


def test_an_incomplete_checkpoint_is_one_sentence(checkpoint):
    version, folder = checkpoint
    lost = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))[-1]
    lost.unlink()
    with pytest.raises(CheckpointError):
        load_hf_model(folder, version, "float32", "cuda")
