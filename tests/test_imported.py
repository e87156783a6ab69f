"""Checkpoints that GPTQModel, AutoAWQ, compressed-tensors and bitsandbytes wrote (tests/data/imported/make.py): read as
the tools themselves read them, and unpacked independently in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_sessions import GREEDY
from safetensors.torch import load_file, save_file

import build
import run
import weight
from baichuan.config import BuildConfig, QuantConfig
from baichuan.engine.folder import read_engine
from baichuan.errors import CheckpointError
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.generation.session import Session
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import run_ranks
from baichuan.quant.weight_only import dequantise, quantise_int4
from baichuan.records import Int4Weight
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


# ---------------------------------------------------------------- engines

INT4 = {"gptq_v1_sym": 32, "gptq_v1_zeros": 64, "gptq_v2_zeros": 32, "awq": 64, "compressed_sym": 32}
INT4 |= {"compressed_zeros": 64}
IDS = [5, 17, 3, 42, 9, 11, 30, 2]


def loaded(name, quant, rank=0, tp_size=1):
    return weight.load_rank(weight.WeightSource(FOLDER / name), model_of(FOLDER / name), quant, rank, tp_size)


@pytest.mark.parametrize("name", INT4)
def test_integers_are_kept_in_an_int4_engine(name):
    weights = loaded(name, QuantConfig("int4", INT4[name])).layers[0]
    matrices = dense(FOLDER / name)
    for record, modules in (
        (weights.qkv, MATRICES[:1]),
        (weights.o_proj, MATRICES[1:2]),
        (weights.gate_up, MATRICES[2:4]),
        (weights.down_proj, MATRICES[4:]),
    ):
        assert isinstance(record, Int4Weight) and record.group_size == INT4[name]
        assert (record.zero is not None) == ("sym" not in name)
        assert dequantise(record).equal(torch.cat([matrices[module] for module in modules]))


@pytest.mark.parametrize("name", ["gptq_ordered", "bitsandbytes_nf4", "gptq_int8_rows"])
def test_integers_in_another_form_are_quantised_anew(name):
    record = loaded(name, QuantConfig("int4", 32)).layers[0].o_proj
    weights = dense(FOLDER / name)["self_attn.o_proj"]
    packed, scale = quantise_int4(weights, 32, torch.float32)
    assert record.packed.equal(packed) and record.scale.equal(scale) and record.zero is None


@pytest.mark.parametrize(("name", "tp_size"), [("gptq_v1_zeros", 2), ("awq", 2), ("compressed_sym", 2)])
def test_every_number_of_ranks_holds_the_same_integers(name, tp_size):
    """192 input channels are three groups of 64: the ranks get one and two."""
    quant = QuantConfig("int4", INT4[name])
    [whole], parts = (
        loaded(name, quant).layers,
        [loaded(name, quant, rank, tp_size).layers[0] for rank in range(tp_size)],
    )
    widths = [part.down_proj.shape[1] for part in parts]
    assert sum(widths) == 192 and all(width % INT4[name] == 0 for width in widths)
    assert (len(set(widths)) == 2) == (INT4[name] == 64)
    for field in ("packed", "scale", "zero"):
        if getattr(whole.down_proj, field) is not None:
            joined = torch.cat([getattr(part.down_proj, field) for part in parts], 1)
            assert joined.equal(getattr(whole.down_proj, field))
            halves = [getattr(part.gate_up, field).chunk(2) for part in parts]
            joined = torch.cat([half for which in zip(*halves, strict=True) for half in which])
            assert joined.equal(getattr(whole.gate_up, field))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", [*INT4, "gptq_ordered", "bitsandbytes_nf4", "bitsandbytes_int8"])
def test_tokens_are_those_of_the_dequantised_form(name, tp_size):
    """In float32, by the CPU executor; INT4 where the integers are kept, else not quantised."""
    folder, quant = FOLDER / name, QuantConfig("int4", INT4[name]) if name in INT4 else QuantConfig()
    config = model_of(folder)
    with torch.inference_mode():
        float_model = load_hf_model(folder, "v1_7b")
        ids = float_model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        expected = ids[0, len(IDS) :].tolist()

    def run(comm):
        executor = CpuExecutor(config, quant, loaded(name, quant, comm.rank, tp_size), comm)
        return Session(executor, config, BuildConfig(world_size=tp_size)).generate([IDS], GREEDY, 12)[0].ids

    assert run_ranks(tp_size, run)[0] == expected


def test_build_keeps_the_integers_and_says_so(tmp_path, capsys):
    """build.py takes the folder's group size, and says what becomes of its integers; run.py reads the engine."""
    folder, limits = FOLDER / "awq", ["--dtype", "float32", "--max_input_len", "16", "--max_output_len", "4"]
    given = ["--model_dir", str(folder), "--model_version", "v1_7b", *limits, "--output_dir", str(tmp_path / "engine")]
    int4 = ["--use_weight_only", "--weight_only_precision", "int4"]
    assert build.main([*given, *int4]) == 0
    said = capsys.readouterr().err
    assert "the integers that AWQ found are kept as they are" in said
    assert float(said.split("mean KL ")[1].split()[0]) < 1e-9  # the same weights
    engine = read_engine(tmp_path / "engine")
    assert (engine.quant.weights, engine.quant.group_size) == ("int4", 64)
    (tmp_path / "ids.csv").write_text("5,6,7\n")
    flags = ["--engine_dir", str(tmp_path / "engine"), "--input_tokens", str(tmp_path / "ids.csv")]
    assert run.main([*flags, "--max_output_len", "4"]) == 0
    for more, sentence in (
        (
            [*int4, "--weight_only_group_size", "32"],
            "quantised to INT4 anew; --use_weight_only ",
        ),
        (["--use_weight_only"], "dequantised from AWQ in 4 bits, and quantised to INT8 anew"),
        ([], "not quantised again; --use_weight_only --weight_only_precision int4 --weight_only_group_size 64 keeps"),
    ):
        assert build.main([*given, *more]) == 0
        assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


def changed(name, folder, settings=None, tensors=None):
    """A copy of the checkpoint with some settings, and with its tensors as tensors(by name) makes them."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


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
