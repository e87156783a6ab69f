"""Weight-only integers in a binary folder: what calibration found goes into engines of every tensor-parallel size."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from binary_models import ROTARY, make_checkpoint, make_samples
from calibration_problems import found_integers
from test_weight_only_ranks import reassembled

import weight
from baichuan.calibration.convert import convert
from baichuan.calibration.request import ConvertRequest
from baichuan.config import QuantConfig, WeightOnly
from baichuan.errors import CheckpointError, ConfigError
from baichuan.quant.weight_only import pack_int4, quantise_int4, quantise_int8
from baichuan.weights.assemble import assemble
from baichuan.weights.rank_tensors import in_memory

MODEL = replace(ROTARY, intermediate_size=128)
FORMS = {
    "int8": WeightOnly("int8"),
    "int4": WeightOnly("int4", symmetric=True),
    "int4 in groups": WeightOnly("int4", 32, symmetric=True),
    "int4 with zeros": WeightOnly("int4", 32),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each form and number of ranks."""
    made = {}

    def folder(form, tp_size):
        if (form, tp_size) not in made:
            request = ConvertRequest(
                tmp_path_factory.mktemp("converted"),
                MODEL,
                partial(make_checkpoint, MODEL),
                tp_size,
                processes=1,
                storage_type="fp16",
                weight_only=form,
            )
            made[form, tp_size] = convert(request, make_samples(MODEL), {})
        return made[form, tp_size]

    return folder


def tensors_of(folder, quant, rank, tp_size):
    return in_memory(weight.rank_tensors(weight.WeightSource(binary_folder=folder), MODEL, quant, rank, tp_size))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_engines_hold_the_integers_that_were_found(folders, form, tp_size, tmp_path):
    quant = QuantConfig(form.precision, form.group_size, form.zero_points)
    ranks = [tensors_of(folders(form, tp_size), quant, rank, tp_size) for rank in range(tp_size)]
    for (layer, name), (q, grid) in found_integers(MODEL, make_samples(MODEL), tmp_path, form).items():
        field, integers = ("packed", pack_int4(q)) if form.precision == "int4" else ("weight", q)
        scale = grid.scale.squeeze(1) if form.precision == "int8" else grid.scale.float()
        fields = {field: integers, "scale": scale} | ({"zero": grid.zero} if form.zero_points else {})
        for key, expected in fields.items():
            found = reassembled(ranks, f"layers.{layer}.{name}", key, form.group_size > 0)
            assert torch.equal(found, expected), (layer, name, key)
            if name == "qkv":
                assert not torch.equal(found.roll(1, 0), expected), "the control: rows in their neighbours' places"
    for tensors in ranks:
        assemble(tensors, MODEL, quant)  # every field is there, and none is left over


def test_another_precision_is_rounded_from_the_folder_s_floats(folders):
    tensors = tensors_of(folders(FORMS["int8"], 1), QuantConfig("int4", 32), 0, 1)
    rounded = tensors_of(folders(FORMS["int4"], 1), QuantConfig("int8"), 0, 1)
    stored = weight.WeightSource(binary_folder=folders(FORMS["int8"], 1)).checkpoint(MODEL, 1)
    rows = stored["model.layers.0.self_attn.W_pack.weight"].read(0, 3 * MODEL.hidden_size)
    assert torch.equal(tensors["layers.0.qkv.packed"], quantise_int4(rows, 32, torch.float32)[0])
    assert torch.equal(rounded["layers.0.qkv.weight"], quantise_int8(rows)[0])


def test_another_group_size_is_refused(folders):
    with pytest.raises(CheckpointError, match="in groups of 32 and 0 is asked for; leave --weight_only_group_size out"):
        tensors_of(folders(FORMS["int4 in groups"], 1), QuantConfig("int4"), 0, 1)


def test_zeros_are_not_left_out(folders):
    with pytest.raises(CheckpointError, match="holds int4 weights with zeros and the opposite is asked for"):
        tensors_of(folders(FORMS["int4 with zeros"], 1), QuantConfig("int4", 32), 0, 1)


def test_a_folder_that_lost_integers_is_refused(folders):
    folder = folders(FORMS["int8"], 2)
    [lost] = folder.glob("model.layers.1.mlp.proj.weight_only.weight.bin")
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of .* files: model.layers.1.mlp.proj.weight_only.weight.bin"):
        tensors_of(folder, QuantConfig("int8"), 0, 2)
    lost.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"has 8191 bytes, and 64 x 128 int8 takes 8192"):
        tensors_of(folder, QuantConfig("int8"), 0, 2)
    lost.write_bytes(content)
    tensors_of(folder, QuantConfig("int8"), 0, 2)


def test_smoothquant_and_integers_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="convert twice"):
        ConvertRequest(tmp_path, MODEL, partial(make_checkpoint, MODEL), alpha=0.5, weight_only=FORMS["int8"])
