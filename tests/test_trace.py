"""What the model asks of every executor: the op lists of all versions, precisions and tensor-parallel sizes."""

import pytest
from hub_folders import small_config

import weight
from baichuan.config import VERSIONS, QuantConfig
from baichuan.executors.trace import trace
from baichuan.records import Step

KINDS = {"none": "Dense", "int8": "Int8", "int4": "Int4"}


def ops_of(version, weights, rank, tp_size, step):
    config, quant = small_config(version), QuantConfig(weights)
    tensors = weight.rank_tensors(weight.WeightSource(), config, quant, rank, tp_size)
    return trace(config, quant, tensors, rank, tp_size, step)


def expected(version, weights, rank, tp_size, tokens, outputs):
    """hub_folders.SIZES: hidden 32, 2 layers, 4 heads, intermediate 48, vocabulary 50."""
    kind, heads = KINDS[weights], 4 // tp_size
    position = "RoPE" if version.endswith("7b") else "ALiBi"
    reduce = [f"all_reduce -> [{tokens}, 32] float16"] if tp_size > 1 else []

    def linear(out, in_features):
        return f"linear {kind} {out}x{in_features} -> [{tokens}, {out}] float16"

    def layer(norm):
        return [
            f"{norm} -> [{tokens}, 32] float16",
            linear(96 // tp_size, 32),
            f"attention {position} heads {rank * heads}-{rank * heads + heads - 1} of 4 "
            f"-> [{tokens}, {32 // tp_size}] float16",
            linear(32, 32 // tp_size),
            *reduce,
            f"add_rms_norm -> [{tokens}, 32] float16",
            linear(96 // tp_size, 32),
            f"silu_mul -> [{tokens}, {48 // tp_size}] float16",
            linear(32, 48 // tp_size),
            *reduce,
        ]

    return [
        f"embedding -> [{tokens}, 32] float16",
        *layer("rms_norm"),
        *layer("add_rms_norm"),
        f"add_rms_norm -> [{tokens}, 32] float16",
        f"select_rows -> [{outputs}, 32] float16",
        f"head Dense {-(-50 // tp_size)}x32 -> [{outputs}, 50] float32",
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize(("rank", "tp_size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_prefill(version, weights, rank, tp_size):
    step = Step.of([[1, 2, 3], [4], [5, 6]])
    assert ops_of(version, weights, rank, tp_size, step) == expected(version, weights, rank, tp_size, 6, 3)


def test_decode_asks_for_the_same_with_one_token_a_sequence():
    step = Step.of([[1, 2, 3], [4]])
    decode = step.next(step.tokens[:2])
    assert ops_of("v2_13b", "none", 0, 1, decode) == expected("v2_13b", "none", 0, 1, 2, 2)


def test_another_size_has_another_list():
    step = Step.of([[1, 2, 3]])
    assert ops_of("v1_7b", "none", 0, 1, step) != ops_of("v1_7b", "none", 0, 2, step)
