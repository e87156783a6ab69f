"""Real plans are built, without a GPU, and say that attention, dequantisation and 8-bit products are fused."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

import trt_cases as cases
from trt_plan import read_plan

import weight
from baichuan.config import QuantConfig
from baichuan.errors import BaichuanError, ConfigError, UnsupportedError
from baichuan.executors.tensorrt import plan_writer
from baichuan.executors.tensorrt.api import load
from baichuan.executors.tensorrt.contract import Contract
from baichuan.executors.tensorrt.network import Graph
from baichuan.executors.tensorrt.plan_writer import FP8_TARGETS, BuildOptions, build_plan

TYPES = {"float16": "half", "bfloat16": "bf16"}
# Kernel ("library": a GEMM of NVIDIA's; else a fused one's name), type of the weight, type of the activation.
PRODUCTS = {
    "int8": ("__myl_CastMulCastFc", "int8", None),
    "int4": ("__myl_ReplCastMulCastFc", "int4", None),
    "smooth_quant": ("library", "int8", "int8"),
    "fp8": ("library", "fp8_e4m3", "fp8_e4m3"),
}
LINEARS = 4 * cases.SIZES["num_layers"]


def built(tmp_path, config, quant, build=None, rank=0, options=None):
    build = build or cases.limits()
    path = tmp_path / "rank.engine"
    values = build_plan(config, quant, build, cases.weights(config, quant, rank, build.world_size), rank, path, options)
    return path, Contract.from_json(values)


def check_fused(tmp_path, version, quant_name, dtype, tp_size):
    config, quant = cases.model(version, dtype), cases.QUANTS[quant_name]
    path, contract = built(tmp_path, config, quant, cases.limits(tp_size), rank=tp_size - 1)
    plan = read_plan(path)
    assert plan.attention == {"_gemm_mha_v2": config.num_layers, "_gemv_mha_v1": config.num_layers}
    assert plan.softmax == 0
    kernel, weight, activation = PRODUCTS.get(quant.weights, (None, TYPES[dtype], None))
    found = [
        (name, count)
        for (name, *types), count in plan.products.items()
        if types == [weight, activation or TYPES[dtype]] and kernel in (None, name)
    ]
    heads = 1 if quant.weights == "none" or quant.quantize_lm_head else 0
    both_profiles = 2
    assert sum(count for _, count in found) in (both_profiles * LINEARS, both_profiles * (LINEARS + heads))
    unfused = [types for types in plan.products if quant.weights != "none" and types[1] == TYPES[dtype]]
    assert sum(plan.products[types] for types in unfused) <= both_profiles  # lm_head alone
    assert contract.targets == (FP8_TARGETS if "fp8" in quant_name else ())


SOME = [
    ("none", "v2_13b", 1),
    ("int8", "v1_7b", 2),
    ("int4-g32-lm_head", "v2_13b", 1),
    ("smooth_quant-per_token-per_channel", "v1_7b", 2),
    ("smooth_quant", "v2_13b", 1),
    ("fp8-kv_fp8", "v1_7b", 1),
    ("int8-kv_int8", "v2_13b", 2),
]  # `-m slow` runs all


@pytest.mark.parametrize("quant, version, tp_size", SOME)
def test_fused(tmp_path, quant, version, tp_size):
    check_fused(tmp_path, version, quant, "float16", tp_size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("version", cases.ALL_VERSIONS)
@pytest.mark.parametrize("quant", cases.QUANTS)
def test_every_cell_is_fused(tmp_path, quant, version, tp_size, dtype):
    check_fused(tmp_path, version, quant, dtype, tp_size)


@pytest.mark.parametrize("version", ["v1_7b", "v1_13b"])
def test_float32_builds_decomposed(tmp_path, version):
    """The control of the proof by names: over prompts, a decomposed attention is seen as one."""
    plan = read_plan(built(tmp_path, cases.model(version), QuantConfig())[0])
    assert plan.attention == {"_gemv_mha_v1": cases.SIZES["num_layers"]}  # decoding alone
    assert plan.softmax == cases.SIZES["num_layers"]


def test_fused_attention_is_required_unless_switched_off(tmp_path):
    """Two heads a rank have no fused kernel."""
    config, path = replace(cases.model("v1_13b", "float16"), num_heads=2), tmp_path / "rank.engine"
    weights = weight.load_rank(weight.WeightSource(), config, QuantConfig())
    with pytest.raises(UnsupportedError, match="no fused attention for 2 heads of 160.*gpt_attention_plugin off"):
        build_plan(config, QuantConfig(), cases.limits(), weights, 0, path)
    assert not path.exists()
    build_plan(config, QuantConfig(), cases.limits(gpt_attention_plugin=False), weights, 0, path)
    assert path.exists()


def test_compute_capabilities(tmp_path):
    config = cases.model("v2_7b", "float16")
    path, contract = built(tmp_path, config, QuantConfig(), options=BuildOptions(("8.6", "12.0")))
    assert contract.targets == ("8.6", "12.0")
    accelerators = {name for name in (b"sm75", b"sm80", b"sm86", b"sm89", b"sm120") if name in path.read_bytes()}
    assert b"sm75" not in accelerators


@pytest.mark.parametrize(
    "quant, options, sentence",
    [
        ("none", BuildOptions(("9.0",)), "does not build for compute capability 9.0; use 7.5, 8.0, 8.6, 8.9"),
        ("fp8", BuildOptions(("8.6", "8.9")), "compute capability 8.6 has no FP8"),
        ("kv_fp8", BuildOptions(("7.5",)), "compute capability 7.5 has no FP8"),
    ],
)
def test_bad_targets_are_one_sentence(tmp_path, quant, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        built(tmp_path, cases.model("v1_7b", "float16"), cases.QUANTS[quant], options=options)


def test_full_tensorrt_takes_no_compute_capability():
    """Its module is not installed here; the rule is checked on a stand-in for its Api."""
    full = type("Api", (), {"rtx": False, "name": "tensorrt", "version": "11.4"})()
    with pytest.raises(ConfigError, match="--compute_capability 8.9 belongs to TensorRT-RTX"):
        BuildOptions(("8.9",)).checked(full, QuantConfig())


def test_missing_module_is_one_sentence():
    with pytest.raises(UnsupportedError, match="tensorrt cannot be imported .*; install it with pip install"):
        load("tensorrt")


def test_drawing(tmp_path):
    path, _ = built(tmp_path, cases.model("v1_7b", "float16"), QuantConfig(), options=BuildOptions(visualize=True))
    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    curves = list(root.iter("{http://www.w3.org/2000/svg}path"))
    for expected in ("input_ids", "layers.1.qkv.weight", "attention_output", "output logits", "present_k.1"):
        assert any(expected in text for text in texts), expected
    assert len(curves) > len(texts)


def test_debug_output(tmp_path):
    config = cases.model("v1_7b", "float16")
    path, contract = built(tmp_path, config, QuantConfig(), options=BuildOptions(debug_output=True))
    assert contract.debug == tuple(f"residual.{index}" for index in range(2 * config.num_layers + 1))
    assert all(name.encode() in path.read_bytes() for name in contract.debug)


def test_a_logged_error_ends_the_build(tmp_path, monkeypatch):
    """TensorRT only logs that a causal attention takes no mask, drops the mask and goes on."""
    add = Graph.attention

    def attention(self, q, k, v, mask, decomposable):
        kinds = self.trt.AttentionNormalizationOp, self.trt.CausalMaskKind
        self.network.add_attention_v2(q, k, v, kinds[0].SOFTMAX, kinds[1].LOWER_RIGHT).mask = mask
        return add(self, q, k, v, mask, decomposable)

    monkeypatch.setattr(Graph, "attention", attention)
    with pytest.raises(UnsupportedError, match="TensorRT says"):
        built(tmp_path, cases.model("v1_7b", "float16"), QuantConfig())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    writer = plan_writer._writer
    monkeypatch.setattr(plan_writer, "_writer", lambda api, file: writer(api, Full()))
    with pytest.raises(UnsupportedError, match="No space left on device.*free disk space"):
        built(tmp_path, cases.model("v1_7b", "float16"), QuantConfig())
    assert not list(tmp_path.iterdir())


def test_contract_survives_json(tmp_path):
    _, contract = built(tmp_path, cases.model("v1_7b", "float16"), QuantConfig(kv_cache="int8"))
    assert Contract.from_json(contract.to_json()) == contract
    with pytest.raises(BaichuanError, match="contract is incomplete"):
        Contract.from_json({key: value for key, value in contract.to_json().items() if key != "profiles"})
