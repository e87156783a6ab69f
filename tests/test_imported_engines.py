"""Engines of checkpoints that other tools quantised: their integers are kept where they can be, and the tokens are
those of the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch
from golden_sessions import GREEDY
from imported_folders import FOLDER, MATRICES, dense, model_of

import build
import run
import weight
from baichuan.config import BuildConfig, QuantConfig
from baichuan.engine.folder import read_engine
from baichuan.executors.cpu.executor import CpuExecutor
from baichuan.generation.session import Session
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import run_ranks
from baichuan.quant.weight_only import dequantise, quantise_int4
from baichuan.records import Int4Weight

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
