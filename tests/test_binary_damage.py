"""Binary folders that are damaged, lack a file or are another engine's: each is refused in one sentence."""

import numpy as np
import pytest
from binary_folders import converted, copied, edit_config, scaled_file
from binary_models import ROTARY

from baichuan.calibration.request import ConvertRequest
from baichuan.config import QuantConfig
from baichuan.errors import CheckpointError, ConfigError
from baichuan.weights.binary.config_ini import BinaryConfig, read_binary_model, write_binary_config
from baichuan.weights.binary.folder import open_binary
from baichuan.weights.calibrated import from_binary
from baichuan.weights.rank_tensors import in_memory


def test_a_rank_reads_its_own_files_alone(tmp_path):
    folder = copied(tmp_path, 0.5, 2)
    for path in folder.glob("*.1.bin"):
        path.unlink()
    for quant in (QuantConfig(), QuantConfig("smooth_quant", per_channel=True, kv_cache="int8")):
        in_memory(from_binary(open_binary(folder, ROTARY, 2), quant, 0))
        with pytest.raises(CheckpointError, match="lacks"):
            from_binary(open_binary(folder, ROTARY, 2), quant, 1)


def cut(folder, name, keep):
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])


WEIGHT = "model.layers.1.mlp.fc.weight.0.bin"
SCALE = "model.layers.0.mlp.gate.scale_w_quant_orig.col.0.bin"
SMOOTH = QuantConfig("smooth_quant", per_channel=True)


@pytest.mark.parametrize(
    "damage, quant, message",
    [
        (lambda f: (f / WEIGHT).unlink(), QuantConfig(), f"lacks 1 of .* files: {WEIGHT}; convert"),
        (lambda f: cut(f, WEIGHT, 1000), QuantConfig(), f"{WEIGHT} has 1000 bytes, and 64 x 96 float32 takes 24576;"),
        (lambda f: cut(f, WEIGHT, 12288), QuantConfig(), "which would fit fp16 instead of float32"),
        (lambda f: edit_config(f, weight_data_type="fp16"), QuantConfig(), "which would fit fp32 instead of float16"),
        (lambda f: edit_config(f, weight_data_type="int8"), QuantConfig(), "weight_data_type = int8"),
        (lambda f: edit_config(f, unseal=False, hidden_size="128"), QuantConfig(), "edited after the conversion"),
        (lambda f: edit_config(f, unseal=False, smoothquant="None"), QuantConfig(), "edited after the conversion"),
        (lambda f: edit_config(f, hidden_size="128"), QuantConfig(), "hidden_size = 128, and the model has 64"),
        (lambda f: edit_config(f, hidden_size="many"), QuantConfig(), "'many', which is no number"),
        (lambda f: edit_config(f, num_hidden_layers=None), QuantConfig(), "has no num_hidden_layers"),
        (lambda f: edit_config(f, multi_query_mode="True"), QuantConfig(), "multi-query"),
        (lambda f: edit_config(f, smoothquant="None"), SMOOTH, "written without -sq"),
        (lambda f: (f / "config.ini").unlink(), QuantConfig(), "cannot be read .* has finished"),
        (lambda f: (f / "config.ini").write_text("[baichuan\n"), QuantConfig(), "config.ini is damaged"),
        (lambda f: (f / "config.ini").write_bytes(b"[baichuan]\na = \xff\n"), QuantConfig(), "config.ini is damaged"),
        (lambda f: (f / "config.ini").write_text("#" * (2 << 20)), QuantConfig(), "larger than"),
        (
            lambda f: (f / SCALE).unlink(),
            SMOOTH,
            f"lacks 1 of .* files: {SCALE}; convert the checkpoint again with -sq",
        ),
        (lambda f: scaled_file(f, SCALE, np.nan), SMOOTH, f"{SCALE} holds a scale that is not a positive number"),
        (lambda f: scaled_file(f, SCALE, 0), SMOOTH, f"{SCALE} holds a scale that is not a positive number"),
        (
            lambda f: [path.unlink() for path in f.glob("*.scale_*_quant_orig.bin")],
            QuantConfig(kv_cache="int8"),
            "lacks 2 of .*scale_y_quant_orig.bin; convert the checkpoint again with -kv",
        ),
        (
            lambda f: [path.unlink() for path in f.glob("*.int8.col.*")],
            SMOOTH,
            "lacks 10 of .* and 5 more; convert the checkpoint again with -sq",
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path, damage, quant, message):
    folder = copied(tmp_path, 0.5)
    in_memory(from_binary(open_binary(folder, ROTARY, 1), quant, 0))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        in_memory(from_binary(open_binary(folder, ROTARY, 1), quant, 0))
    assert "\n" not in str(caught.value)


def test_another_world_size_is_one_sentence():
    with pytest.raises(CheckpointError, match="written for 2 ranks and the engine has 1; build with --world_size 2"):
        open_binary(converted(None, 2), ROTARY, 1)
    with pytest.raises(ConfigError, match="num_heads 4 is not divisible by tp_size 3"):
        ConvertRequest(converted(None, 1), ROTARY, dict, tp_size=3)
    with pytest.raises(ConfigError, match="outside .0, 1."):
        ConvertRequest(converted(None, 1), ROTARY, dict, alpha=1.5)


def test_another_version_is_one_sentence():
    folder = converted(None, 1)
    assert read_binary_model(folder, "v2_7b", "float16").num_heads == 4
    with pytest.raises(ConfigError, match="contradicts model_version v1_13b"):
        read_binary_model(folder, "v1_13b", "float16")


def test_keys_of_a_hubs_config_that_the_file_cannot_hold(tmp_path):
    hostile = {"sha256": "0", "SHA256": "1", "a = b": "2", "[x]": "3", "#": "4", "": "5", "a\nb": "6", "c": "\ud800\nd"}
    write_binary_config(tmp_path, {"hidden_size": 64, **hostile})
    found = BinaryConfig(tmp_path)
    assert found.integer("hidden_size") == 64 and set(found.values) == {"hidden_size", "c", "sha256"}
    assert found.text("c") == "\\ud800 d"


@pytest.mark.parametrize("which", ["k", "v"])
def test_a_lost_scale_of_k_or_v_is_not_replaced_by_qkvs(tmp_path, which):
    folder = copied(tmp_path, None)
    model = read_binary_model(folder, ROTARY.model_version, "float32")
    open_binary(folder, model, 1).kv_scales(1, "int8")
    name = f"model.layers.1.attention.query_key_value.scale_{which}_quant_orig.bin"
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}; convert"):
        open_binary(folder, model, 1).kv_scales(1, "int8")


@pytest.mark.parametrize("name", ["vocab_embedding.weight.bin", "model.layers.1.mlp.fc.weight.0.bin"])
def test_a_nan_in_a_folder_is_found(tmp_path, name):
    folder = copied(tmp_path, None)
    values = np.fromfile(folder / name, np.float32)
    values[7] = np.nan
    values.tofile(folder / name)
    binary = open_binary(folder, read_binary_model(folder, ROTARY.model_version, "float32"), 1)
    with pytest.raises(CheckpointError, match=f"{name} holds a NaN or an infinity"):
        for source in binary.checkpoint().values():
            source.read(0, source.shape[0])
